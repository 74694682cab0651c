"""The job: its stages in order, each skipped when it is done already.

data → sft → collect → rm → ppo → evaluate → report
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable

from cluster.process import log_to_file
from configs.run import STAGES, RunConfig, Stage
from keel.constitution import keep_constitution
from keel.display import Display
from keel.interrupt import InterruptedRun, stop_on_signal
from keel.online.stage import HaltedRun
from keel.planning.gate import check_cluster, check_this_machine
from keel.roles import Roles
from keel.rundir import RunDirectory, open_run
from keel.runtime import Runtime
from keel.stages import STAGE_FUNCTIONS
from reward_service.rewards.compose import check_rewards

INTERRUPTED_EXIT_CODE = 130
log = logging.getLogger(__name__)


def run_pipeline(config: RunConfig, *, resume: bool, fresh: bool) -> int:
    """Run the configured stages. Returns the exit code; raises KeelError with what was done kept on disk."""
    check_rewards(config.reward)
    check_this_machine(config, resume=resume)
    with open_run(config, resume=resume, fresh=fresh) as run, stop_on_signal() as stop:
        keep_constitution(config, run.path)
        log_to_file(run.path / "logs" / "driver-0.log")
        wanted = [stage for stage in STAGES if stage in config.stages]
        with Display(run.path, wanted) as display:
            try:
                with Runtime(config, run, stop=stop, refresh=display.refresh) as runtime:
                    check_cluster(runtime)
                    if config.redis.url is not None:
                        runtime.check_redis()
                    roles = Roles(runtime)
                    bodies = {stage: functools.partial(STAGE_FUNCTIONS[stage], runtime, roles) for stage in wanted}
                    for stage in wanted:
                        try:
                            _run_stage(stage, run, bodies[stage])
                        except HaltedRun:
                            if "report" in wanted:
                                _run_stage("report", run, bodies["report"])
                            raise
                        stop.check()
            except InterruptedRun as error:
                log.info("stopped on request", exc_info=True)
                print(f"keel: {error}", flush=True)
                return INTERRUPTED_EXIT_CODE
            except KeyboardInterrupt:
                log.info("stopped at once", exc_info=True)
                print("keel: stopped at once; earlier checkpoints are kept, --resume goes on from the last", flush=True)
                return INTERRUPTED_EXIT_CODE
            except Exception:
                log.exception("the run ended")  # For keel diagnose, which cannot ask the terminal.
                raise
    print(f"keel: done: {run.path}")
    return 0


def _run_stage(stage: Stage, run: RunDirectory, body: Callable[[], None]) -> None:
    if run.done(stage) and stage != "report":
        run.emit(stage=stage, event="skip", seconds=run.stage_seconds[stage])
        return
    with run.stage(stage):
        body()
