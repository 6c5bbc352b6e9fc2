"""The laws of grids, and their times against values worked out by hand."""

import math

import pytest
import torch

from mdiff.core import grids, schedules
from mdiff.core.errors import UsageError

SCHEDULES = [
    schedules.linear(),
    schedules.betas([0.01] * 7),
    schedules.vp_linear(),
    schedules.cosine(),
    schedules.ve(),
]


def indices(grid: grids.Grid, steps: int = 1000) -> list[float]:
    """The grid on a table as indices, without the clean end."""
    schedule = schedules.linear(steps=steps)
    times = grid(schedule)
    assert times[-1] == 0
    return schedule.index(times)[:-1].tolist()


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda schedule: schedule.name)
@pytest.mark.parametrize("steps", [1, 2, 3, 7, 50])
@pytest.mark.parametrize("name", grids.NAMES)
def test_laws(name: str, steps: int, schedule: schedules.Schedule) -> None:
    counts = name in ("leading", "trailing")
    if counts and (schedule.steps is None or schedule.steps < steps):
        with pytest.raises(UsageError):
            grids.from_name(name, steps)(schedule)
        return
    times = grids.from_name(name, steps)(schedule)
    assert times.shape == (steps + 1,) and times.dtype == torch.float64
    assert (times.diff() < 0).all() and times[-1] == 0
    if name != "leading":
        assert times[0] == schedule.high
    if not counts and steps > 1:
        assert times[-2] == schedule.low


def test_leading_spacing() -> None:
    assert indices(grids.leading(10)) == [900, 800, 700, 600, 500, 400, 300, 200, 100, 0]
    assert indices(grids.leading(4, offset=1)) == [751, 501, 251, 1]
    # 1000 // 30 = 33
    assert indices(grids.leading(30))[:2] == [957, 924]


def test_trailing_spacing() -> None:
    assert indices(grids.trailing(10)) == [999, 899, 799, 699, 599, 499, 399, 299, 199, 99]
    # 1000, 666.67, 333.33 rounded, less one
    assert indices(grids.trailing(3)) == [999, 666, 332]
    assert indices(grids.trailing(1000)) == list(range(999, -1, -1))


def test_linear_spacing() -> None:
    assert indices(grids.linear(4)) == pytest.approx([999, 666, 333, 0])
    assert indices(grids.linear(1000)) == pytest.approx(list(range(999, -1, -1)))


def test_karras_spacing() -> None:
    # (80^(1/7) + i/4 (0.002^(1/7) - 80^(1/7)))^7, i = 0 ... 4
    schedule = schedules.ve(0.002, 80.0, low=1e-9)
    _, sigma = schedule(grids.karras(5)(schedule))
    expected = [80.0, 17.52783, 2.51525, 0.17, 0.002]
    ends = 80 ** (1 / 7), 0.002 ** (1 / 7)
    for i in (1, 2, 3):
        expected[i] = (ends[0] + i / 4 * (ends[1] - ends[0])) ** 7
    assert expected[1:4] == pytest.approx([17.5278, 2.5152, 0.1698], rel=1e-3)
    assert sigma[:5].tolist() == pytest.approx(expected, rel=1e-6)
    assert sigma[5] == 0


def test_logsnr_spacing() -> None:
    schedule = schedules.vp_linear()
    log_snr = schedule.log_snr(grids.logsnr(9)(schedule)[:-1])
    torch.testing.assert_close(log_snr.diff(), log_snr.diff().mean().expand(8), rtol=1e-9, atol=0)


def test_truncate_starts_part_of_the_way() -> None:
    schedule = schedules.linear()
    whole = grids.trailing(10)(schedule)
    part = grids.truncate(grids.trailing(10), 0.6)(schedule)
    assert torch.equal(part, whole[4:]) and part[0] == 0.6
    assert torch.equal(grids.truncate(grids.trailing(10), 1.0)(schedule), whole)
    with pytest.raises(UsageError, match=r"start 0.05.*t = 0.1"):
        grids.truncate(grids.trailing(10), 0.05)(schedule)


def test_misuse_is_refused() -> None:
    with pytest.raises(UsageError, match="at least 1 step"):
        grids.karras(0)
    with pytest.raises(UsageError, match="1001 steps"):
        grids.trailing(1001)(schedules.linear())
    with pytest.raises(UsageError, match="continuous"):
        grids.leading(10)(schedules.cosine())
    with pytest.raises(UsageError, match="'karras'"):
        grids.from_name("karas", 10)
    with pytest.raises(UsageError, match="power"):
        grids.from_name("karras", 10, power=3)


def test_rho_of_karras() -> None:
    schedule = schedules.vp_linear()
    times = grids.from_name("karras", 3, rho=1.0)(schedule)
    ratio = torch.exp(-schedule.log_snr(times[:3]) / 2)
    assert math.isclose(ratio[1], (ratio[0] + ratio[2]) / 2, rel_tol=1e-9)
