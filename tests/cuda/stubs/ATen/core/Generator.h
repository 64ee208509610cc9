#pragma once
// In place of torch's own header, which takes long to compile: the hooks of a device only name a generator.
#include <c10/core/Device.h>
namespace at {
struct Generator {
  void* implementation;
};
} // namespace at
