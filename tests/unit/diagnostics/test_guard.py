"""Bad steps are counted, spikes are found, and a run that cannot go on stops."""

import math

import pytest
import torch

from trainer.diagnostics.guard import Guard, GuardSettings, TrainingError

CPU = torch.device("cpu")


def observed(guard: Guard, norms: list[float], applied: bool = True) -> None:
    for norm in norms:
        guard.observe(torch.tensor(norm), torch.tensor(applied))


def arrived(guard: Guard) -> dict[str, float]:
    return {"loss": 1.0, "grad_norm": math.nan, **{name: float(value) for name, value in guard.metrics().items()}}


def test_the_limit_is_mean_plus_deviations_once_half_the_window_is_known():
    guard = Guard(GuardSettings(spike_deviations=3, spike_window=10), CPU)
    observed(guard, [1, 3, 1, 3])
    assert guard.limit.item() == math.inf
    observed(guard, [1, 3])
    assert guard.limit.item() == 2 + 3 * 1  # norms 1 and 3 alternate: mean 2, deviation 1


def test_the_window_forgets_what_is_older():
    guard = Guard(GuardSettings(spike_deviations=1, spike_window=10), CPU)
    observed(guard, [100.0] * 7 + [5.0] * 10)
    assert guard.limit.item() == 5


def test_skipped_steps_do_not_enter_the_window():
    guard = Guard(GuardSettings(spike_deviations=1, spike_window=10), CPU)
    observed(guard, [2.0] * 10)
    observed(guard, [math.nan, math.inf, 1e9], applied=False)
    assert guard.limit.item() == 2
    assert guard.metrics()["skipped"].item() == 3


def test_too_many_bad_steps_in_a_row_end_the_run():
    guard = Guard(GuardSettings(max_bad_steps=3), CPU)
    observed(guard, [math.nan] * 2, applied=False)
    observed(guard, [1.0])
    observed(guard, [math.nan] * 2, applied=False)
    guard.check(5, arrived(guard), [7, 8])
    observed(guard, [math.nan], applied=False)
    with pytest.raises(TrainingError, match=r"3 steps in a row up to step 6 were skipped \(guard.max_bad_steps=3\)"):
        guard.check(6, arrived(guard), [9])


def test_the_rows_of_a_skipped_step_are_named(caplog):
    guard = Guard(GuardSettings(), CPU)
    observed(guard, [1.0])
    guard.check(1, arrived(guard), [3])
    assert not caplog.records
    observed(guard, [math.nan], applied=False)
    guard.check(2, arrived(guard), [11, 4])
    assert "step 2 was skipped: loss 1.0, gradient norm nan, rows 11, 4" in caplog.text


def test_steps_without_gradient_are_said_as_long_as_they_last(caplog):
    guard = Guard(GuardSettings(), CPU)
    for step, norm in enumerate([1.0, *[0.0] * 5, 1.0, 0.0], start=1):
        observed(guard, [norm])
        guard.check(step, arrived(guard) | {"grad_norm": norm}, [1])
    spans = [message.partition(" taught")[0] for message in caplog.messages]
    assert spans == ["steps 2 to 3", "steps 2 to 5"]


def kept_limit(norms: list[float]) -> float:
    values = torch.tensor(norms, dtype=torch.float64)
    return (values.mean() + 2 * values.std(correction=0)).item()


@pytest.mark.parametrize("size", [10, 12, 30])
def test_a_restored_guard_goes_on_as_the_old_one(size):
    norms = [float(i % 7 + 1) for i in range(23)]
    old = Guard(GuardSettings(spike_deviations=2, spike_window=12), CPU)
    observed(old, norms)
    new = Guard(GuardSettings(spike_deviations=2, spike_window=size), CPU)
    new.load_state_dict(old.state_dict())
    kept = torch.tensor(norms[-min(size, 12) :], dtype=torch.float64)
    if size < 30:  # less than half of 30 is known
        assert math.isclose(new.limit.item(), (kept.mean() + 2 * kept.std(correction=0)).item(), rel_tol=1e-12)
    observed(new, [8.0] * 20)
    assert new.limit.item() == (8.0 if size < 20 else pytest.approx(kept_limit([*norms[-10:], *[8.0] * 20])))
    if size == 12:
        observed(old, [8.0] * 20)
        assert new.state_dict() == old.state_dict()
