"""What watches a run beside the computation: progress, metrics, logs, clocks, traces, signals."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterator
from types import FrameType
from typing import Any, TextIO

import jax
from etils import epath
from jax.experimental import multihost_utils

from esm1nv_jax.common.console import bar, console
from esm1nv_jax.common.errors import EXIT_INTERRUPTED, EXIT_SAVED
from esm1nv_jax.common.metrics_log import MetricsWriter
from esm1nv_jax.training.distributed import Watchdog
from esm1nv_jax.training.metrics import HostClock, ScalarMetrics, ThroughputWindow
from esm1nv_jax.training.objective import Objective
from esm1nv_jax.training.process_group import ProcessGroup
from esm1nv_jax.training.run_config import RunConfig
from esm1nv_jax.training.workdir import log_line

NOTICE = "saving after this step (Ctrl-C again: exit at once, unsaved)"


class NonfiniteStep(Exception):
    """A step whose loss or gradient is not finite ended the run.

    `step`, `batch` (this process's rows, on the host) and `metrics` are those of that step.
    """

    def __init__(self, step: int, batch: dict, metrics: dict[str, float]):
        super().__init__(f"step {step} is not finite")
        self.step, self.batch, self.metrics = step, batch, metrics


class RunMonitor:
    """Everything beside the computation, for one process of a run; a context manager.

    `step` steps are done so far; `saved` are the metadata of the checkpoint that the run resumes
    from. They are {} where it begins: metrics that an earlier start left do not count then. `log`
    is that of this host.
    """

    def __init__(
        self,
        config: RunConfig,
        objective: Objective,
        run_dir: epath.Path,
        group: ProcessGroup,
        watchdog: Watchdog,
        log: TextIO,
        mesh: jax.sharding.Mesh,
        step: int,
        saved: dict[str, Any],
    ):
        self._config, self._group, self._log, self._watchdog = config, group, log, watchdog
        # Of all steps so far, validations and saves included.
        self._seconds_before, self._started = saved.get("seconds", 0.0), time.monotonic()
        self._unlogged: tuple[int, dict[str, float]] | None = None  # the last step, its metrics
        self._objective, primary = objective, group.is_primary
        self._writer = MetricsWriter(run_dir, step if saved else -1, primary)
        tuning = config.finetune.tuning if config.finetune else None
        self._window = ThroughputWindow(config.model, list(mesh.devices.flat), objective, tuning)
        self._clock = HostClock(group, mesh.local_devices[0])
        self._profiler = StepProfiler(
            *(config.profile_steps if primary else (0, 0)), run_dir / "profile"
        )
        total = None if config.minutes else config.steps
        self._bar = bar("training", total, "steps", primary, start=step)
        self._preemption = PreemptionHandler(jax.distributed.is_initialized())
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> RunMonitor:
        self._stack.enter_context(self._writer)  # closed last, after the final metrics
        self._stack.enter_context(self._preemption)
        self._progress = self._stack.enter_context(self._bar)
        self._stack.enter_context(self._profiler)
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.__exit__(*error)

    def heartbeat(self, activity: str) -> None:
        """Note that the run makes progress and begins `activity`."""
        self._watchdog.heartbeat(activity)

    def start(self) -> None:
        """Begin to measure throughput, and lower the stall timeout from that of the start-up."""
        self._started = time.monotonic()
        self._window.restart()
        self._clock.restart()
        self._watchdog.stall_timeout = self._config.cluster.stall_timeout

    @contextlib.contextmanager
    def waiting_for_batch(self, step: int, state) -> Iterator[None]:
        """Around fetching the batch of `step`; `state` is what the step before it returned."""
        self.heartbeat(f"waiting for the batch of step {step}")
        self._profiler.before_step(step, state)
        with self._clock.waiting("data_wait"):
            yield
        self.heartbeat(f"at step {step}")

    def process_metrics(
        self, step: int, batch: dict, metrics: ScalarMetrics, last: bool = False
    ) -> None:
        """Fetch the metrics of `step`; log them, if it is time or this is the `last` step.

        Raises NonfiniteStep where they end the run.
        """
        with self._clock.waiting("device_wait"):
            values = metrics.fetch()
        if values["halted"]:
            raise NonfiniteStep(step, batch, values)
        self._window.add(values)
        self._unlogged = step, values
        if last or step % self._config.log.every == 0:
            self.write_train()
        self._progress.update(step, self._progress.note)

    def write_train(self) -> None:
        """Log the training metrics of the steps since the last line, if there are any."""
        if self._unlogged is None:
            return
        (step, values), self._unlogged = self._unlogged, None
        norms = ("gradient_norm", "parameter_norm", "update_norm", "learning_rate")
        train = self._window.take() | {name: values[name] for name in (*norms, "nonfinite")}
        self._writer.write(step, "train", train)
        hosts = self._clock.take()
        self._writer.write(step, "hosts", hosts)
        listed = "  ".join(f"{name} {value:.3g}" for name, value in hosts.items())
        log_line(self._log, f"step {step}  {listed}")
        self._progress.note = (
            f"{self._objective.progress_note(train)}  {train['tokens_per_second']:,.0f} tokens/s"
        )

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """Around evaluation and saving, which are not training time."""
        with self._window.pause():
            self._clock.probe()
            yield

    def write_validation(self, step: int, metrics: dict[str, float]) -> None:
        self._writer.write(step, "validation", metrics)

    @property
    def seconds(self) -> float:
        """The time that all steps so far took, from the first start of the run on."""
        return self._seconds_before + time.monotonic() - self._started

    def reached_limit(self, step: int) -> bool:
        """Return whether `step` is the last by `config.steps` or `config.minutes`; call it once a
        step. All processes get the same answer: process 0's clock decides.
        """
        limit = 60 * self._config.minutes
        if step >= self._config.steps or not limit:
            return step >= self._config.steps
        return self._group.broadcast(f"time/{step}", lambda: str(self.seconds >= limit)) == "True"

    def should_stop(self, step: int) -> bool:
        """Return whether a signal asks to stop after `step`; call it once a step."""
        return self._preemption.should_stop(step)

    @property
    def stop_status(self) -> int:
        """The exit status that a signal asks for; 0 where none came."""
        return self._preemption.exit_status if self._preemption.stopping else 0


class StepProfiler:
    """While entered, traces the steps `first` to `last` into a folder, by JAX's profiler."""

    def __init__(self, first: int, last: int, folder: epath.Path):
        self.first, self.last, self.folder, self._tracing = first, last, folder, False

    def before_step(self, step: int, state) -> None:
        """Start or stop the trace before `step`; `state` is what the step before it returned."""
        if step == self.first:
            jax.block_until_ready(state)  # or the end of the step before would be in the trace
            jax.profiler.start_trace(self.folder)
            self._tracing = True
        elif self._tracing and step == self.last + 1:
            jax.block_until_ready(state)
            self._write()

    def _write(self) -> None:
        self._tracing = False
        jax.profiler.stop_trace()
        console.print(
            f"profile    of steps {self.first} to {self.last} in {self.folder}: open it with "
            "xprof, or its .json.gz at ui.perfetto.dev"
        )

    def __enter__(self) -> StepProfiler:
        return self

    def __exit__(self, *_) -> None:
        if self._tracing:
            self._write()


class PreemptionHandler:
    """While entered, records the first SIGINT, SIGTERM or SIGHUP, so that the run ends after the
    current step, saved; a second SIGINT interrupts at once.

    Without a launcher a plain handler does it. With one, a SIGTERM to any process, at any time
    since JAX was initialized, goes through JAX's preemption `service`, which makes all of them stop
    after the same step. SIGHUP, the signal of a lost terminal, is handled unless it is ignored, as
    under `nohup`.
    """

    def __init__(self, service: bool = False):
        self.service = service
        self.signal: int | None = None
        self.stopping = False

    def should_stop(self, step: int) -> bool:
        """Return whether to stop after `step`: the same on every process. Call it every step."""
        if self.service:
            self.stopping = multihost_utils.reached_preemption_sync_point(step)
        else:
            self.stopping = self.signal is not None
        return self.stopping

    @property
    def exit_status(self) -> int:
        return EXIT_INTERRUPTED if self.signal == signal.SIGINT else EXIT_SAVED

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None:
            if number == signal.SIGINT:
                raise KeyboardInterrupt
            return  # after a Ctrl-C, launch/local.sh sends a SIGTERM, too
        self.signal = number
        console.print(f"{signal.Signals(number).name}: {NOTICE}")
        if self.service:
            os.kill(os.getpid(), signal.SIGTERM)  # the preemption service tells all processes

    def __enter__(self) -> PreemptionHandler:
        # The preemption service has a handler of its own for SIGTERM, which must stay.
        handled = [signal.SIGINT] if self.service else [signal.SIGINT, signal.SIGTERM]
        if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
            handled.append(signal.SIGHUP)
        self._previous = {number: signal.signal(number, self._handle) for number in handled}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
