"""The morning's schedules: a look every five minutes at what is owed, and a run where something is."""

from collections.abc import Iterator
from datetime import date

import dagster as dg

from retention_ops.orchestration import JOB, RANGE_END, RANGE_START, UNFINISHED, Loop, close_killed_runs, dates_to_repeat
from retention_ops.settings import Settings
from retention_ops.sources.morning import Morning, owed

PULL_JOB = "pull_orders"


def morning_schedules(settings: Settings) -> list[dg.ScheduleDefinition]:
    """Yesterday in shop_timezone from schedule_time on, whatever was missed before it, and the source until its data is complete.

    One for each job: Dagster starts the job of the schedule, whatever job a request names. Both look at the same, and ask for their own.
    """
    loop = _schedule(settings, JOB, f"Yesterday in {settings.shop_timezone} from {settings.schedule_time} on; waits for complete data "
                                    f"until {settings.data_deadline}; catches up what was missed, oldest first.")
    pull = _schedule(settings, PULL_JOB, f"Asks the source for what is not in from {settings.schedule_time} on: every 15 minutes until "
                                         f"{settings.data_deadline}, every hour after it.")
    return [loop, pull] if settings.source else [loop]


def _schedule(settings: Settings, job: str, description: str) -> dg.ScheduleDefinition:
    hour, minute = (int(part) for part in settings.schedule_time.split(":"))

    @dg.schedule(
        name=f"{job}_schedule", cron_schedule=[f"{minute} {hour} * * *", "*/5 * * * *"], execution_timezone=settings.shop_timezone,
        job_name=job, default_status=dg.DefaultScheduleStatus.RUNNING, description=description,
    )
    def look(context: dg.ScheduleEvaluationContext, loop: dg.ResourceParam[Loop]):
        if killed := close_killed_runs(context.instance):
            return dg.SkipReason(f"run {killed[0]} was killed; Dagster may be about to repeat it")
        busy = [run for run in context.instance.get_runs(dg.RunsFilter(statuses=UNFINISHED)) if run.job_name in (JOB, PULL_JOB)]
        if busy:
            return dg.SkipReason(f"run {busy[0].run_id} is not finished")
        morning = owed(loop.lake, loop.clock)
        found = list(_requests(morning, loop))
        if not found and (failed := dates_to_repeat(context.instance, loop.settings, morning.newest)):
            found = [_run(*failed, f"again:{morning.slot}")]
        mine = [request for request in found if request.job_name == job]
        others = f"{found[0].job_name} has its turn" if found else f"{morning.newest} is computed and nothing was missed"
        return mine or dg.SkipReason(morning.waits or others)

    return look


def _requests(morning: Morning, loop: Loop) -> Iterator[dg.RunRequest]:
    """What can be computed, else the source once more; what it brings is due at the next look."""
    if morning.due:
        yield _run(morning.due[0], morning.due[-1], f"{loop.lake.orders().version}:{morning.slot}")
    elif morning.waits and loop.settings.source:
        yield dg.RunRequest(run_key=f"pull:{morning.slot}", job_name=PULL_JOB)


def _run(first: date, last: date, look: str) -> dg.RunRequest:
    dates = {"dagster/partition": str(first)} if first == last else {RANGE_START: str(first), RANGE_END: str(last)}
    return dg.RunRequest(run_key=f"loop:{first}:{last}:{look}", job_name=JOB, tags={**dates, "dagster/priority": "5"})
