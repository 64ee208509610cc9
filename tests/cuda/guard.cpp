// What FakeTensorMode needs to hold tensors of device "cuda" on a CPU build of torch: a device guard, and hooks that say that there
// is one GPU. Preloaded, since torch asks for the hooks once.
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

namespace {
using namespace c10;

struct Guard : impl::NoOpDeviceGuardImpl<DeviceType::CUDA> {
  Device getDevice() const override {
    return Device(DeviceType::CUDA, 0);
  }
  Device exchangeDevice(Device) const override {
    return getDevice();
  }
  Stream getStream(Device) const noexcept override {
    return Stream(Stream::DEFAULT, Device(DeviceType::CUDA, 0));
  }
};
C10_REGISTER_GUARD_IMPL(CUDA, Guard);
} // namespace

namespace at {
namespace {
struct Hooks : CUDAHooksInterface {
  Hooks(CUDAHooksArgs) {}
  void init() const override {}
  bool hasCUDA() const override {
    return true;
  }
  bool isAvailable() const override {
    return true;
  }
  bool isBuilt() const override {
    return true;
  }
  bool hasPrimaryContext(DeviceIndex) const override {
    return true;
  }
  DeviceIndex deviceCount() const override {
    return 1;
  }
  DeviceIndex getCurrentDevice() const override {
    return 0;
  }
};
C10_REGISTER_CLASS(CUDAHooksRegistry, CUDAHooks, Hooks)
} // namespace
} // namespace at
