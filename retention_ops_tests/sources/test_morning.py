"""Which dates a morning owes: yesterday, what was missed, what was corrected; and how long it waits for data that does not come."""

import logging
import subprocess
import uuid
from datetime import UTC, date, datetime, timedelta
from zoneinfo import ZoneInfo

import dagster as dg
import pytest
from dagster._core.test_utils import create_test_daemon_workspace_context
from dagster._core.workspace.load_target import ModuleTarget
from dagster._scheduler.scheduler import launch_scheduled_runs

from retention_ops.definitions import build_defs
from retention_ops.launch import instance, run_dates
from retention_ops.log import runs
from retention_ops.log.database import ops_database
from retention_ops.orchestration import JOB, PROCESS_TAG, RANGE_END, RANGE_START, Loop, process_mark
from retention_ops.settings import Settings
from retention_ops.sources import sensors
from retention_ops.sources.ingest import ingest
from retention_ops.sources.morning import owed
from retention_ops.sources.pull import pull
from retention_ops.sources.sensors import PULL_JOB
from retention_ops.warehouse.lake import Lake
from retention_ops_tests.execute.stage import store_alerts
from retention_ops_tests.log.test_runs_log import row

BERLIN = ZoneInfo("Europe/Berlin")
FIRST, TODAY = date(2024, 3, 1), date(2024, 4, 3)
YESTERDAY = TODAY - timedelta(1)


class Shop:
    """A dozen customers who come every fifth day; `sell` brings orders in through the front door."""

    def __init__(self, home, **changes):
        self.settings = Settings(_env_file=None, home=home, **{"shop_timezone": "Europe/Berlin", **changes})
        self.now = datetime(2024, 4, 3, 6, 0, tzinfo=BERLIN)
        home.mkdir()
        self.lake = Lake(self.settings)

    def clock(self) -> datetime:
        return self.now.astimezone(UTC)

    def sell(self, first: date, last: date, amount: int = 20, **how) -> None:
        file = self.settings.home / "orders.csv"
        days = [first + timedelta(step) for step in range((last - first).days + 1)]
        rows = [f"{day}-{who},c{who},{day},{amount}" for day in days for who in range(12) if (day.toordinal() + who) % 5 == 0]
        file.write_text("\n".join(["order_id,customer_id,order_date,order_amount", *rows]))
        ingest([file], "orders", self.settings, clock=self.clock, **how)

    def owed(self):
        return owed(self.lake, self.clock)

    def at(self, text: str):
        self.now = datetime.fromisoformat(text).replace(tzinfo=BERLIN)
        return self.owed()


@pytest.fixture
def shop(tmp_path):
    found = Shop(tmp_path / "home")
    found.sell(FIRST, YESTERDAY)
    return found


def test_from_schedule_time_on_yesterday_is_due_until_it_is_computed(shop):
    store_alerts(shop.lake, date(2024, 3, 25), date(2024, 4, 1))
    early = shop.at("2024-04-03 05:59")
    assert (early.newest, early.due, early.waits) == (date(2024, 4, 1), (), "")
    found = shop.at("2024-04-03 06:00")
    assert (found.newest, found.due, found.missed, found.stale, found.late, found.waits) == (YESTERDAY, (YESTERDAY,), 1, 0, False, "")
    store_alerts(shop.lake, YESTERDAY, YESTERDAY)
    assert shop.owed().due == ()


def test_the_first_morning_begins_with_one_date(shop):
    assert shop.owed().due == (YESTERDAY,), "history is for backfill"


@pytest.mark.parametrize("days", [7, 30])
def test_what_was_missed_is_due_oldest_first(shop, days):
    last = YESTERDAY - timedelta(days)
    store_alerts(shop.lake, last, last)
    found = shop.owed()
    assert found.due == tuple(last + timedelta(step) for step in range(1, days + 1)) and found.missed == days


def test_data_that_is_not_in_is_waited_for_until_the_deadline_and_then_the_date_is_computed_without_it(shop):
    store_alerts(shop.lake, date(2024, 3, 25), YESTERDAY)
    waiting = shop.at("2024-04-04 06:00")
    assert (waiting.due, waiting.late) == ((), False)
    assert waiting.waits == "orders are complete through 2024-04-02, not 2024-04-03: looked for again until 08:00, every 15 minutes"
    late = shop.at("2024-04-04 08:00")
    assert (late.due, late.late) == ((TODAY,), True) and "08:00 has passed: late" in late.waits
    store_alerts(shop.lake, TODAY, TODAY)
    assert set(shop.lake.read("alert_logic", TODAY)["gate"]) == {"data_incomplete"}
    assert shop.at("2024-04-04 11:00").due == (), "computed once, and looked for every hour"
    shop.sell(TODAY, TODAY)
    came = shop.owed()
    assert (came.due, came.missed, came.stale, came.waits) == ((TODAY,), 0, 1, "")
    store_alerts(shop.lake, TODAY, TODAY)
    assert "data_incomplete" not in set(shop.lake.read("alert_logic", TODAY)["gate"]) and shop.owed().due == ()


def test_a_home_that_is_not_fed_any_more_is_not_followed_through_the_calendar(shop):
    store_alerts(shop.lake, date(2024, 3, 25), YESTERDAY)
    assert shop.at("2024-04-10 08:00").due == tuple(YESTERDAY + timedelta(step) for step in range(1, 8))
    found = shop.at("2024-04-11 08:00")
    assert found.due == () and found.late and "orders are complete through 2024-04-02, not 2024-04-10" in found.waits
    shop.sell(TODAY, date(2024, 4, 10))
    assert shop.owed().due == tuple(TODAY + timedelta(step) for step in range(8)), "and caught up when its data comes"


def test_older_missed_dates_do_not_wait_for_the_newest(shop):
    store_alerts(shop.lake, date(2024, 3, 25), date(2024, 3, 30))
    found = shop.at("2024-04-04 06:00")
    assert found.due == (date(2024, 3, 31), date(2024, 4, 1), YESTERDAY) and found.waits


def test_a_day_without_orders_is_complete_when_the_source_says_so(shop):
    store_alerts(shop.lake, date(2024, 3, 25), YESTERDAY)
    shop.at("2024-04-04 08:00")
    store_alerts(shop.lake, TODAY, TODAY)
    shop.sell(YESTERDAY, YESTERDAY, complete_through=TODAY)
    assert shop.owed().due == (TODAY,), "the date was held back for nothing"


def test_corrections_are_rebuilt_as_far_back_as_rebuild_days(shop):
    store_alerts(shop.lake, FIRST, YESTERDAY)
    shop.sell(date(2024, 3, 12), date(2024, 3, 12), amount=30, replace=True)
    found = shop.owed()
    assert found.due == tuple(YESTERDAY - timedelta(6 - step) for step in range(7)) and (found.missed, found.stale) == (0, 7)


def test_the_clocks_going_forward_and_back_lose_and_double_no_morning(tmp_path):
    shop = Shop(tmp_path / "home", schedule_time="02:30", data_deadline="03:30")
    shop.sell(FIRST, date(2024, 3, 30))
    shop.now = datetime(2024, 3, 31, 1, 29, tzinfo=UTC)  # 03:29: at 02:00 it became 03:00, so 02:30 is half an hour after that
    assert shop.owed().newest == date(2024, 3, 29)
    shop.now += timedelta(minutes=1)
    assert (shop.owed().newest, shop.owed().due) == (date(2024, 3, 30), (date(2024, 3, 30),))
    autumn = datetime(2024, 10, 26, 22, 0, tzinfo=UTC)  # midnight of a day of 25 hours
    looks = []
    for minutes in range(0, 25 * 60, 15):
        shop.now = autumn + timedelta(minutes=minutes)
        looks.append(shop.owed().slot)
    waiting = [slot for slot in looks if slot.endswith("q")]
    assert len(waiting) == len(set(waiting)) == 8, "two hours from the first 02:30 to 03:30, a name for each quarter"


def test_no_orders_at_all_is_nothing_to_compute(tmp_path):
    found = Shop(tmp_path / "home").owed()
    assert found.due == () and found.complete_through is None and found.waits.startswith("no orders came yet, not 2024-04-02")


# -- the schedule ------------------------------------------------------------------------------------------------------


def tick(shop, stored, job=JOB):
    loop = Loop(shop.lake, shop.clock)
    repository = build_defs(shop.settings, loop).get_repository_def()
    schedule = repository.get_schedule_def(f"{job}_schedule")
    assert schedule.job_name == job, "the daemon starts the job of the schedule, whatever job a request names"
    context = dg.build_schedule_context(stored, scheduled_execution_time=shop.now, repository_def=repository, resources={"loop": loop})
    return schedule.evaluate_tick(context)


@pytest.mark.slow
def test_a_week_asleep_ends_in_one_run_of_its_dates(shop):
    store_alerts(shop.lake, date(2024, 3, 25), date(2024, 3, 26))
    with dg.instance_for_test() as stored:
        (request,) = tick(shop, stored).run_requests
        assert request.job_name == JOB and (request.tags[RANGE_START], request.tags[RANGE_END]) == ("2024-03-27", "2024-04-02")
        assert [again.run_key for again in tick(shop, stored).run_requests] == [request.run_key], "the daemon starts one run for one key"
        assert run_dates(Loop(shop.lake, shop.clock), date(2024, 3, 27), YESTERDAY, stored).success
        done = tick(shop, stored)
        assert not done.run_requests and done.skip_message == "2024-04-02 is computed and nothing was missed"


def test_an_unfinished_run_is_not_doubled(shop):
    with dg.instance_for_test() as stored:
        run = stored.create_run_for_job(build_defs(shop.settings, Loop(shop.lake, shop.clock)).resolve_job_def(JOB))
        skipped = tick(shop, stored)
        assert not skipped.run_requests and skipped.skip_message == f"run {run.run_id} is not finished"


def test_one_date_is_asked_for_as_its_partition_and_again_an_hour_after_it_failed(shop):
    store_alerts(shop.lake, date(2024, 4, 1), date(2024, 4, 1))
    with dg.instance_for_test() as stored:
        (first,) = tick(shop, stored).run_requests
        assert first.tags["dagster/partition"] == "2024-04-02" and sensors.RANGE_START not in first.tags
        shop.at("2024-04-03 06:55")
        assert [one.run_key for one in tick(shop, stored).run_requests] == [first.run_key]
        shop.at("2024-04-03 07:00")
        assert [one.run_key for one in tick(shop, stored).run_requests] != [first.run_key]


@pytest.mark.slow
def test_a_run_that_failed_after_its_alerts_were_stored_is_asked_for_again_each_hour_until_it_succeeds(shop, tmp_path):
    """A broken template: the brief fails, and with it the answer, when the tables are there."""
    templates = tmp_path / "templates"
    templates.mkdir()
    shop.lake.settings = shop.settings = shop.settings.model_copy(update={"templates_dir": templates})
    with dg.instance_for_test() as stored:
        (templates / "words.j2").write_text("{% nonsense %}")
        assert not run_dates(Loop(shop.lake, shop.clock), YESTERDAY, YESTERDAY, stored).success
        assert shop.owed().due == (), "its alert is stored"
        (again,) = tick(shop, stored).run_requests
        assert again.job_name == JOB and again.tags["dagster/partition"] == str(YESTERDAY)
        shop.at("2024-04-03 06:45")
        assert [one.run_key for one in tick(shop, stored).run_requests] == [again.run_key], "one try for one hour"
        shop.at("2024-04-03 07:00")
        (later,) = tick(shop, stored).run_requests
        assert later.run_key != again.run_key
        (templates / "words.j2").unlink()
        assert run_dates(Loop(shop.lake, shop.clock), YESTERDAY, YESTERDAY, stored).success
        assert not tick(shop, stored).run_requests
        (templates / "words.j2").write_text("{% nonsense %}")
        older = YESTERDAY - timedelta(3)
        assert not run_dates(Loop(shop.lake, shop.clock), older, older, stored).success
        assert not tick(shop, stored).run_requests, "older dates are somebody's own matter"


def test_a_run_whose_answer_failed_outside_is_not_computed_again(shop):
    """A ticket that is refused is the sensors' matter, and a person's."""
    store_alerts(shop.lake, YESTERDAY, YESTERDAY)
    with dg.instance_for_test() as stored:
        job = build_defs(shop.settings, Loop(shop.lake, shop.clock)).resolve_job_def(JOB)
        tags = {"dagster/partition": str(YESTERDAY)}
        failed = stored.create_run_for_job(job, status=dg.DagsterRunStatus.FAILURE, tags=tags).run_id
        assert tick(shop, stored).run_requests
        with ops_database(shop.settings) as engine:
            runs.append(engine, row(run_id=failed, alert_date=YESTERDAY, status="failed"))
        assert not tick(shop, stored).run_requests


def test_a_run_whose_process_was_killed_does_not_hold_up_the_schedule(shop):
    with dg.instance_for_test() as stored, subprocess.Popen(["true"]) as gone:
        gone.wait()
        run_id = str(uuid.uuid4())
        job = build_defs(shop.settings, Loop(shop.lake, shop.clock)).resolve_job_def(JOB)
        mark = process_mark(run_id, gone.pid)
        stored.create_run_for_job(job, run_id=run_id, status=dg.DagsterRunStatus.STARTED, tags={PROCESS_TAG: mark.replace("::", ":1:")})
        assert f"run {run_id} was killed" in tick(shop, stored).skip_message
        assert stored.get_run_by_id(run_id).status == dg.DagsterRunStatus.FAILURE
        assert tick(shop, stored).run_requests


def test_every_run_of_the_loop_says_which_process_it_lives_in(shop):
    with dg.instance_for_test() as stored:
        job = build_defs(shop.settings, Loop(shop.lake, shop.clock)).resolve_job_def("pull_orders")
        run = job.execute_in_process(instance=stored)
        assert stored.get_run_by_id(run.run_id).tags[PROCESS_TAG] == process_mark(run.run_id)


def test_while_it_waits_the_schedule_says_so(shop):
    store_alerts(shop.lake, date(2024, 3, 25), YESTERDAY)
    shop.at("2024-04-04 06:20")
    with dg.instance_for_test() as stored:
        assert "looked for again until 08:00" in tick(shop, stored).skip_message


# -- a source that is asked ----------------------------------------------------------------------------------------------


class Export(Shop):
    """The same shop with its orders in a csv file that a source reads."""

    def __init__(self, home, **changes):
        self.file = home.parent / "exports" / "orders.csv"
        self.file.parent.mkdir()
        select = home.parent / "orders.sql"
        select.write_text("SELECT order_id, customer_id, order_date AS ordered_at, order_amount, 'EUR' AS currency, 'paid' AS status, "
                          "FALSE AS is_test FROM source_files")
        super().__init__(home, source="files", source_path=str(self.file.parent), source_sql=select, **changes)

    def sell(self, first: date, last: date) -> None:
        """Brings the file to what was sold; nobody has asked for it yet."""
        days = [first + timedelta(step) for step in range((last - first).days + 1)]
        rows = [f"{day}-{who},c{who},{day},20" for day in days for who in range(12) if (day.toordinal() + who) % 5 == 0]
        self.file.write_text("\n".join(["order_id,customer_id,order_date,order_amount", *rows]))


def asked(shop, stored) -> list[dg.RunRequest]:
    """What both schedules ask for in one tick."""
    return [request for job in (JOB, PULL_JOB) for request in tick(shop, stored, job).run_requests]


def do(shop, stored, request: dg.RunRequest) -> dg.ExecuteInProcessResult:
    """The run that the daemon starts for a request: of the job of that name, as the code location defines it."""
    job = build_defs(shop.settings, Loop(shop.lake, shop.clock)).resolve_job_def(request.job_name)
    return job.execute_in_process(instance=stored, raise_on_error=False, tags={**request.tags, "dagster/run_key": request.run_key})


@pytest.mark.slow
def test_a_source_whose_orders_are_not_complete_is_asked_and_then_yesterday_is_computed(tmp_path):
    shop = Export(tmp_path / "home")
    shop.sell(FIRST, YESTERDAY)
    with dg.instance_for_test() as stored:
        (first,) = asked(shop, stored)
        assert first.job_name == PULL_JOB and not first.tags.get("dagster/partition")
        assert tick(shop, stored).skip_message.startswith("no orders came yet")
        assert do(shop, stored, first).success and shop.lake.orders().complete_through == YESTERDAY
        store_alerts(shop.lake, YESTERDAY, YESTERDAY)
        assert asked(shop, stored) == [] and "nothing was missed" in tick(shop, stored, PULL_JOB).skip_message

        shop.at("2024-04-04 06:00")
        (second,) = asked(shop, stored)
        assert second.job_name == PULL_JOB and second.run_key != first.run_key
        assert do(shop, stored, second).success and shop.lake.orders().complete_through == YESTERDAY, "asked, and nothing came"
        shop.now += timedelta(minutes=14)
        assert [again.run_key for again in asked(shop, stored)] == [second.run_key], "the daemon starts one run for one key"
        shop.now += timedelta(minutes=1)
        shop.sell(FIRST, TODAY)
        (again,) = asked(shop, stored)
        assert again.run_key != second.run_key and do(shop, stored, again).success
        (loop,) = asked(shop, stored)
        assert (loop.job_name, loop.tags["dagster/partition"]) == (JOB, str(TODAY))
        assert tick(shop, stored, PULL_JOB).skip_message == f"{JOB} has its turn"
        assert shop.lake.days("alert_logic") == [YESTERDAY], "a pull computes nothing"


def test_a_pull_that_fails_is_asked_for_again_with_the_next_slot_and_what_it_brings_is_due(tmp_path):
    shop = Export(tmp_path / "home")
    with dg.instance_for_test() as stored:
        (first,) = asked(shop, stored)
        assert not do(shop, stored, first).success
        assert [again.run_key for again in asked(shop, stored)] == [first.run_key]
        shop.at("2024-04-03 06:15")
        (again,) = asked(shop, stored)
        assert again.job_name == PULL_JOB and again.run_key != first.run_key
        shop.sell(FIRST, YESTERDAY)
        assert do(shop, stored, again).success
        assert [(due.job_name, due.tags["dagster/partition"]) for due in asked(shop, stored)] == [(JOB, str(YESTERDAY))]


@pytest.mark.slow
def test_the_daemons_own_scheduler_starts_the_jobs_that_are_asked_for(tmp_path, monkeypatch):
    """Everything that looks at runs knows them by their jobs' names. With a clock that runs: the code server has its own."""
    shop = Export(tmp_path / "home", schedule_time="00:00", data_deadline="23:59")
    today = datetime.now(BERLIN).date()
    last = today - timedelta(2)
    shop.now = datetime.now(BERLIN)
    shop.sell(today - timedelta(30), last)
    for name in ("home", "source", "source_path", "source_sql", "shop_timezone", "schedule_time", "data_deadline"):
        monkeypatch.setenv(f"RETENTION_OPS_{name.upper()}", str(getattr(shop.settings, name)))
    pull(shop.lake)
    target = ModuleTarget("retention_ops.definitions", None, str(tmp_path), "retention_ops")
    with instance(shop.settings) as stored, create_test_daemon_workspace_context(target, stored) as workspace:
        moment, known = datetime.now(UTC), {}

        def runs() -> list[dg.DagsterRun]:
            list(launch_scheduled_runs(workspace, logging.getLogger("scheduler"), moment, known))
            return stored.get_runs(dg.RunsFilter(statuses=sensors.UNFINISHED))

        assert runs() == [], "the first look notes that there are schedules"
        moment += timedelta(minutes=6)
        (run,) = runs()
        assert (run.job_name, run.tags["dagster/partition"]) == (JOB, str(last))
        stored.report_run_canceled(run)
        store_alerts(shop.lake, last, last)
        moment += timedelta(minutes=5)
        (run,) = runs()
        assert run.job_name == PULL_JOB
