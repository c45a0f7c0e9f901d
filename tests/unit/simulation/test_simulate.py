from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from psgd.cli import main
from psgd.core.server.journal import Journal, RecordKind
from psgd.errors import RunNotFoundError, SpecError
from psgd.simulation.command import read_journal
from psgd.simulation.delays import Constant, Exponential, Slow
from psgd.simulation.quadratic import Quadratic
from psgd.simulation.scenario import Scenario, jobs_to_simulate
from psgd.simulation.simulate import QuadraticWorkload, SimulationResult, simulate
from psgd.spec import SimulationTarget
from psgd.spec.changes import override_spec
from psgd.spec.reader import load_spec
from psgd_workers.messages import BatchId, Version

JOB = """
model: {kind: mlp, hidden: [16]}
data: {format: sklearn, dataset: digits, batch_size: 32, normalize: unit, validation_fraction: 0.2}
optimizer: {lr: 0.2}
run: {epochs: 2}
"""


@pytest.fixture(autouse=True)
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Write a valid job.yaml to the folder in which the command runs."""
    monkeypatch.chdir(tmp_path)
    Path("job.yaml").write_text(JOB)


@pytest.fixture
def psgd(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """Return a function that runs `psgd simulate job.yaml ...` in this process.

    Its arguments are those of the command; it returns the exit code, stdout and stderr.
    """

    def command(*arguments: str) -> tuple[Any, str, str]:
        monkeypatch.setattr(sys, "argv", ["psgd", "simulate", "job.yaml", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        return (ended.value.code, *capsys.readouterr())

    return command


def dynamics(
    mode: str, scenario: Scenario, pushes: int = 600, target: SimulationTarget | None = None
) -> SimulationResult:
    """Simulate one mode on a small quadratic."""
    job = load_spec("job.yaml", ["run.epochs=1", "optimizer.lr=0.05", f"simulate.modes='{mode}'"])
    ((name, spec),) = jobs_to_simulate(job, scenario.workers).items()
    return simulate(name, spec, QuadraticWorkload(16, pushes, seed=0), scenario, target)


# The quadratic


def test_the_quadratics_gradient_is_that_of_its_excess() -> None:
    quadratic = Quadratic(8, noise=0.0)
    random = np.random.default_rng(0)
    weights = random.standard_normal(8).astype(np.float32)
    out = np.empty(8, np.float32)
    quadratic.gradient(BatchId(0, 0, 0), weights, out)
    for i in range(8):
        step = np.zeros(8, np.float32)
        step[i] = 1e-2
        slope = (quadratic.excess(weights + step) - quadratic.excess(weights - step)) / 2e-2
        assert out[i] == pytest.approx(slope, abs=1e-3)


def test_the_quadratics_excess_is_0_at_its_minimum_and_nowhere_less() -> None:
    quadratic = Quadratic(8, noise=0.0)
    weights = quadratic.start
    out = np.empty(8, np.float32)
    for _ in range(3000):
        quadratic.gradient(BatchId(0, 0, 0), weights, out)
        weights -= out
    assert quadratic.excess(weights) == pytest.approx(0, abs=1e-5)
    assert quadratic.excess(quadratic.start) > 1


def test_the_quadratics_noise_has_the_deviation_asked_for() -> None:
    quadratic = Quadratic(50, noise=0.3, seed=1)
    out = np.empty(50, np.float32)
    plain = np.empty(50, np.float32)
    Quadratic(50, noise=0.0).gradient(BatchId(0, 0, 0), quadratic.start, plain)
    draws = []
    for _ in range(400):
        quadratic.gradient(BatchId(0, 0, 0), quadratic.start, out)
        draws.append(out - plain)
    assert np.std(draws) == pytest.approx(0.3, rel=0.02)


# Throughput and staleness, compared with closed forms


def test_async_of_constant_times_makes_n_updates_a_turn_with_staleness_n_less_1() -> None:
    found = dynamics("async", Scenario(5, Constant(2.0)))
    assert found.updates == 600
    assert found.updates_per_s == pytest.approx(5 / 2.0, rel=0.03)
    assert found.staleness["p50"] == 4
    assert found.staleness["mean"] == pytest.approx(4, abs=0.1)


def test_bsp_takes_as_long_as_the_slowest() -> None:
    found = dynamics("bsp", Scenario(4, Slow(3.0, Constant(1.0))))
    assert found.updates == 150
    assert found.updates_per_s == pytest.approx(1 / 3, rel=0.03)
    assert found.staleness["max"] == 0


def test_a_slow_worker_has_a_small_share() -> None:
    found = dynamics("async", Scenario(4, Slow(3.0, Constant(1.0))), pushes=12_000)
    assert sum(found.shares.values()) == pytest.approx(1)
    assert found.shares["worker-3"] == pytest.approx(1 / 10, abs=0.01)
    assert found.shares["worker-0"] == pytest.approx(3 / 10, abs=0.01)


def test_a_link_takes_its_time_twice() -> None:
    slow, fast = (dynamics("async", Scenario(2, Constant(1.0), link_s=link)) for link in (0.5, 0.0))
    assert fast.updates_per_s / slow.updates_per_s == pytest.approx(2, rel=0.03)


def test_several_servers_that_hear_of_everything_at_once_are_one() -> None:
    job = load_spec("job.yaml", ["run.epochs=1", "optimizer.lr=0.05"])
    one, three = (
        simulate(
            "async",
            override_spec(job, [f"scaling.servers={servers}", "scaling.pipeline=1"]),
            QuadraticWorkload(16, 600, seed=0),
            Scenario(2, Exponential(1.0)),
            None,
        )
        for servers in (1, 3)
    )
    assert three == one
    assert one.staleness["max"] is not None


def test_batches_computed_ahead_hide_a_link_at_the_price_of_staleness() -> None:
    scenario = Scenario(2, Constant(1.0), link_s=0.5)
    job = load_spec("job.yaml", ["run.epochs=1", "optimizer.lr=0.05", "scaling.workers=2"])
    plain, ahead = (
        simulate(
            "async", override_spec(job, [f"scaling.pipeline={n}"]), QuadraticWorkload(16, 2000, seed=0), scenario, None
        )
        for n in (0, 1)
    )
    assert ahead.updates_per_s / plain.updates_per_s == pytest.approx(2, rel=0.05)
    assert (plain.staleness["p50"], ahead.staleness["p50"]) == (1, 3)


def test_ringmaster_refuses_what_async_applies() -> None:
    scenario = Scenario(16, Exponential(1.0))
    modes = ("async", "ringmaster:r=8", "ringmaster:r=8:stop=true")
    free, bounded, stopped = (dynamics(mode, scenario) for mode in modes)
    assert (free.staleness["max"] or 0) >= 8 > (bounded.staleness["max"] or 0)
    assert free.pushes["requeued"] == 0 < bounded.pushes["requeued"]
    assert stopped.pushes["requeued"] == 0  # a computation that is called off is never pushed
    assert (stopped.staleness["max"] or 0) < 8
    assert free.updates == bounded.updates == stopped.updates == 600


def test_crashes_and_joins_leave_the_epoch_whole() -> None:
    found = dynamics("async", Scenario(6, Exponential(1.0), crash_s=8.0, join_s=3.0, seed=3))
    assert found.crashes > 3
    assert len(found.shares) > 6
    assert (found.status, found.examples, found.pushes["applied"]) == ("finished", 600, 600)


def test_a_target_ends_the_run_and_says_when_and_after_how_much() -> None:
    scenario = Scenario(4, Exponential(1.0))
    found, whole = (
        dynamics("async", scenario, target=target) for target in (SimulationTarget(metric="excess", value=0.5), None)
    )
    assert found.time_to_target_s is not None
    assert found.examples_to_target is not None
    assert 0 < found.time_to_target_s <= found.time_s < whole.time_s
    assert found.examples_to_target <= found.examples < whole.examples == 600
    before = [point.value for point in found.curve if point.time_s < found.time_to_target_s]
    assert min(before) > 0.5
    assert whole.time_to_target_s is None


def test_the_same_seed_gives_the_same_run_and_another_one_another() -> None:
    first, again, other = (dynamics("async", Scenario(5, Exponential(1.0), seed=seed)) for seed in (1, 1, 2))
    assert first == again
    assert first.time_s != other.time_s


# Modes to simulate


@pytest.mark.parametrize(
    ("modes", "message"),
    [
        ("async,,bsp", "one of them is empty"),
        ("bsp,bsp", "two of the modes are named 'bsp': give different modes"),
        ("ringmaster", r"simulate\.modes\.0\.consistency\.r: missing"),
        ("k_sync:k=9", "mode k_sync:k=9: .*\n  consistency.k is 9, but the job has 4 workers"),
        ("ringmaster:r", "expected FIELD=VALUE, such as r=32, in the mode 'ringmaster:r', not 'r'"),
        ("ringmastr:r=3", r"simulate\.modes\.0\.consistency\.mode: .* did you mean 'ringmaster'"),
        ("bsp:correction=staleness_lr", "does nothing in mode bsp"),
    ],
)
def test_modes_that_make_no_sense_are_refused(modes: str, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        jobs_to_simulate(load_spec("job.yaml", [f"simulate.modes='{modes}'"]), 4)


def test_a_mode_may_have_a_rate_and_a_correction_of_its_own() -> None:
    spec = load_spec("job.yaml", ["simulate.modes='async:lr=0.5:correction=delay_adaptive,bsp'"])
    first, second = jobs_to_simulate(spec, 4).values()
    assert (first.optimizer.lr, first.correction.name) == (0.5, "delay_adaptive")
    assert (second.optimizer.lr, second.correction.name, second.consistency.mode) == (0.2, "none", "bsp")
    assert first.simulate is None


def test_the_jobs_own_mode_keeps_its_fields() -> None:
    own = "consistency={mode: ringmaster, r: 5}"
    jobs = jobs_to_simulate(load_spec("job.yaml", [own, "simulate.modes='ringmaster,ringmaster:r=9'"]), 4)
    assert {name: job.consistency.model_dump()["r"] for name, job in jobs.items()} == {
        "ringmaster": 5,
        "ringmaster:r=9": 9,
    }
    assert list(jobs_to_simulate(load_spec("job.yaml", [own]), 4)) == ["ringmaster"]


def test_a_rate_replaces_the_jobs_under_either_name() -> None:
    changes = ["optimizer={learning_rate: 0.3}", "simulate={modes: [{consistency: {mode: bsp}, lr: 0.1}]}"]
    (job,) = jobs_to_simulate(load_spec("job.yaml", changes), 4).values()
    assert job.optimizer.lr == 0.1


def test_a_journal_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RunNotFoundError, match="holds no journal"):
        read_journal(str(tmp_path))
    np.save(tmp_path / "other.npy", np.arange(3))
    with pytest.raises(RunNotFoundError, match="holds no journal"):
        read_journal(str(tmp_path / "other.npy"))


def test_journals_of_any_number_of_servers_are_read(tmp_path: Path) -> None:
    """A run may be resumed with another number of servers."""
    (tmp_path / "journal").mkdir()
    for partitions in (1, 2):
        journal = Journal(partitions)
        journal.member(RecordKind.JOIN, 1.5, f"worker-{partitions}", Version(1, 0))
        np.save(tmp_path / "journal" / f"{partitions}.npy", journal.take())
    assert read_journal(str(tmp_path))["worker"].tolist() == [b"worker-1", b"worker-2"]
    assert read_journal(str(tmp_path / "journal" / "2.npy"))["now"].tolist() == [1.5]


# The command


def test_the_jobs_own_model_and_data_are_simulated(psgd: Any) -> None:
    code, out, err = psgd("--workers", "3", "--delays", "exponential:1", "--modes", "async,bsp", "--json")
    assert code == 0, err
    first, second = json.loads(out)["results"]
    assert (first["name"], second["name"]) == ("async", "bsp")
    assert first["examples"] == second["examples"] == 2 * 1438
    assert first["metric"] == "val/loss"
    assert first["curve"][-1][2] < first["curve"][0][2]
    assert (first["updates"], second["updates"]) == (2 * 45, 2 * 15)
    assert "simulated async: 90 updates" in err


def test_a_simulated_job_that_diverges_is_told_so(psgd: Any) -> None:
    code, _, err = psgd("--workers", "2", "--set", "optimizer.lr=1e38")
    assert code == 0
    assert "updates in 1.02 virtual s; failed: " in err


def test_one_simulated_worker_computes_what_a_serial_loop_does(psgd: Any) -> None:
    code, out, _ = psgd("--workers", "1", "--json")
    (found,) = json.loads(out)["results"]
    assert (code, found["time_s"], found["staleness"]["max"]) == (0, pytest.approx(89, rel=0.03), 0)


def test_a_page_is_written(psgd: Any) -> None:
    code, _, err = psgd(
        *("--model", "quadratic", "--pushes", "300", "--size", "8", "--workers", "4"),
        *("--modes", "async,rennala:s=2", "--html", "out/page.html", "--delays", "slow:20,gamma,100,0.01"),
    )
    assert code == 0, err
    page = Path("out/page.html").read_text()
    assert page.count("<svg") == 7
    assert "rennala:s=2" in page
    assert "4 workers, slow, factor 20, base gamma, shape 100, scale 0.01 virtual seconds a gradient, seed 0." in page


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--delays", "lognormol:0,1"), "did you mean 'lognormal'"),
        (("--model", "cubic"), "simulate.model: expected quadratic, not 'cubic'"),
        (("--model", "quadratic", "--until", "val/loss=1"), "a quadratic has only excess"),
        (("--until", "excess=1"), "excess, which only a quadratic has"),
        (("--crashes", "-1"), "simulate.crash_s: expected at least 1e-12, not -1.0"),
        (("--delays", "measured:nowhere"), "holds no journal"),
    ],
)
def test_what_makes_no_sense_is_refused_with_exit_2(psgd: Any, arguments: tuple[str, ...], message: str) -> None:
    code, out, err = psgd(*arguments)
    assert (code, out) == (2, "")
    assert message in err


def test_the_jobs_section_says_what_is_simulated_and_options_win_over_it(psgd: Any) -> None:
    section = "{model: quadratic, size: 8, pushes: 40, workers: 3, modes: [bsp, 'async:lr=0.01'], delays: 'gamma:9,1'}"
    Path("job.yaml").write_text(f"{JOB}simulate: {section}\n")
    code, out, err = psgd("--pushes", "60", "--json")
    assert code == 0, err
    first, second = json.loads(out)["results"]
    assert (first["name"], first["updates"], second["name"], second["updates"]) == ("bsp", 20, "async:lr=0.01", 60)
    code, out, err = psgd("--modes", "async", "--delays", "constant:2", "--workers", "1", "--json")
    (found,) = json.loads(out)["results"]
    assert (code, found["updates"], found["time_s"]) == (0, 40, pytest.approx(80, rel=0.03))
