"""Each piece of advice that speaks of who waits for whom, on a run where it is right and on one where it is not."""

import msgspec
import pytest
from test_compare import make_summary as make_compared
from test_report import T0, make_pushes, make_run, write_log

from asgd_mpi.record.events import End, Interval, Start
from asgd_mpi.record.summary import summarize
from asgd_mpi.report import units
from asgd_mpi.report.advice import advise
from asgd_mpi.report.compare import compare
from asgd_mpi.report.cost import price


def make_summary(path, config=(), **phases):
    """A run on one host of CPUs, whose workers' seconds are those of `phases`; `server_*`: those of rank 0."""
    summary = summarize(make_run(path / "run", make_pushes()))
    for rank in summary.ranks:
        rank.host, rank.device = "node0", "cpu"
        own = {name: phases.get(name if rank.rank else f"server_{name}", 0.0) for name in rank.phases}
        rank.phases, rank.seconds = own, sum(own.values()) or rank.seconds
    for worker in summary.workers:
        worker.host, worker.device = "node0", "cpu"
    server = summary.ranks[0]
    return msgspec.structs.replace(
        summary, config=dict(config), apply_s=server.phases["apply"] / server.counts["pushes"],
        server_busy=server.phases["apply"] / server.seconds if server.seconds else 0.0)


def said(summary):
    return " ".join(advise(summary))


LONG_PUSH = {"compute": 4.0, "push": 6.0, "server_apply": 1.0, "server_idle": 9.0}


def test_a_wait_in_push_is_for_a_core_on_one_host_and_for_the_message_on_several(tmp_path):
    summary = make_summary(tmp_path, **LONG_PUSH)
    assert "they wait for a core. All 4 ranks compute on its CPUs" in said(summary) and "message" not in said(summary)
    summary.ranks[2].host = "node1"
    assert "they wait for the message to travel" in said(summary) and "for a core" not in said(summary)


def test_under_a_rule_that_waits_the_wait_is_for_the_slowest_worker(tmp_path):
    summary = make_summary(tmp_path, {"rule.name": "sync"}, **LONG_PUSH)
    summary.ranks[1].counts["pushes"] = summary.ranks[2].counts["pushes"] = summary.ranks[3].counts["pushes"] = 20
    assert "under sync they wait there for each other. No one of them is much slower" in said(summary)
    summary.ranks[2].phases["compute"] = 20.0
    assert "Rank 2 takes 1 s for a step, the median is 200 ms" in said(summary) and "for a core" not in said(summary)
    summary.config["rule.name"] = "asgd"
    assert "they wait for a core" in said(summary) and "each other" not in said(summary)


def test_who_waits_for_the_other_servers_waits_for_no_core_and_the_server_has_less_room(tmp_path):
    summary = make_summary(tmp_path, **LONG_PUSH)
    alone = [text for text in advise(summary) if "It can serve about" in text]
    summary.ranks[0].phases |= {"servers": 4.0, "idle": 5.0}
    text = said(summary)
    assert "Rank 0 waits 40 % of its time for the other servers" in text and "for a core" not in text
    pushes = summary.ranks[0].counts["pushes"]
    steps = sum(rank.phases["compute"] for rank in summary.ranks) / sum(rank.counts["pushes"] for rank in summary.ranks[1:])
    limit = int(1 + steps / (5.0 / pushes))
    assert f"about {units.count(limit, 'worker')} like" in text and "with the wait for the other servers" in text
    assert f"about {units.count(int(1 + steps / (1.0 / pushes)), 'worker')} like" in alone[0]


def test_nobody_waits_for_a_straggler_but_under_a_rule_that_waits(tmp_path):
    summary = make_summary(tmp_path, compute=1.0)
    assert "Nobody waits for them" in said(summary) and "with the stalest gradients" in said(summary)
    summary.config["rule.name"] = "ssp"
    assert "The others wait for them" in said(summary)
    summary.workers[0].mean_staleness = 99.0
    assert "stalest" not in said(summary)


def test_a_worker_that_validates_or_was_retired_is_no_straggler(tmp_path):
    run = make_run(tmp_path / "run", make_pushes())
    assert [worker.rank for worker in summarize(run).stragglers] == [3]
    write_log(run.metrics_of(3), [Interval(T0 + 100, T0 + 200, validate=100.0)])       # most of its time
    assert not summarize(run).stragglers


def test_a_larger_batch_is_advised_in_images_a_batch_not_a_push(tmp_path):
    summary = make_summary(tmp_path, {"data.batch_size": 5, "exchange.n_push": 2}, compute=1.0, server_apply=9.5, server_idle=0.5)
    assert "--data.batch_size 10)" in said(summary) and "More workers will not help" in said(summary)


def test_the_clocks_of_other_hosts_do_not_move_the_beginning_of_a_run(tmp_path):
    run = make_run(tmp_path / "run", make_pushes())
    right = summarize(run)
    run.metrics_of(2).unlink()
    behind = 1000.0
    write_log(run.metrics_of(2), [
        Start(T0 + 0.2 - behind, 2, "worker", "node1", "cuda:0", 3, 1000, 120, 600, clock_offset_s=behind),
        Interval(T0 - behind, T0 + 1 - behind, compute=1.0), End(T0 + 8 - behind, "finished")])
    found = summarize(run)
    assert (found.started, found.training_s, found.duration_s) == pytest.approx((right.started, right.training_s, right.duration_s))


def test_a_stage_is_a_gpu_and_a_rank_that_was_killed_before_the_last_start_is_no_problem(tmp_path):
    run = make_run(tmp_path / "run", make_pushes())
    write_log(run.metrics_of(4), [Start(T0, 4, "stage", "node0", "cuda:0", 3, 1000)])
    cost = price(summarize(run), 1.0)
    assert cost.num_gpus == 4 and cost.gpu_hours == pytest.approx(4 * summarize(run).duration_s / 3600)
    assert "no End event from rank 4" in " ".join(summarize(run).problems)
    for rank in range(3):
        write_log(run.metrics_of(rank, 1), [Start(T0 + 100, rank, "worker" if rank else "server", "node0", "cuda:0", 2, 1000),
                                            Interval(T0 + 100, T0 + 110, idle=10.0), End(T0 + 110, "finished")])
    found = summarize(run)
    assert not any("rank 4" in problem or "rank 3" in problem for problem in found.problems) and found.crews == [3, 2]
    assert price(found, 3600.0).total == pytest.approx(4 * 8 + 2 * 10) and price(found, 3600.0, num_gpus=1).total == pytest.approx(18)


def test_no_speed_up_is_told_that_was_not_measured(tmp_path):
    several = [make_compared(tmp_path / str(number), number, 100.0 * number, [0.5, 0.3, 0.1]) for number in (3, 4)]
    found = compare(several)
    assert {entry.speedup for entry in found.entries} == {None} == {entry.efficiency for entry in found.entries} and found.fit is None
    assert "No run had one worker" in found.sentences[0] and "No limit is fitted" in found.sentences[1]
    one = make_compared(tmp_path / "1", 1, 125.0, [0.5, 0.3, 0.1])
    found = compare([*several, one])
    assert [entry.speedup for entry in found.entries] == pytest.approx([1.0, 2.4, 3.2]) and found.fit
    several[0].restarts = [*several[0].restarts, msgspec.structs.replace(several[0].restarts[0], restart=1, num_workers=2)]
    found = compare([*several, one])
    assert [entry.speedup for entry in found.entries] == [1.0, None, pytest.approx(3.2)] and found.fit is None
    assert "had different numbers of workers" in found.sentences[0]
    assert any("From 1 to 4 workers" in text for text in found.sentences)
    assert not any("to 3 workers" in text for text in compare([several[0], one]).sentences)


def test_two_and_two_point_nought_are_one_setting(tmp_path):
    runs = [make_compared(tmp_path / str(number), 1, 100.0, [0.5, 0.3], settings={"schedule.warmup_epochs": value, "schedule.lr": lr})
            for number, (value, lr) in enumerate([(2, 0.1), (2.0, 0.10000001)])]
    assert compare(runs).differences == {"schedule.lr": ["0.1", "0.10000001"]}


def test_durations_and_counts_read_as_they_are_meant():
    assert [units.seconds(value) for value in (0.0714, 24, 125, 3725)] == ["0.07 s", "24.0 s", "2 min 05 s", "1 h 02 min 05 s"]
    assert [units.workers(crews) for crews in ([1], [32], [3, 2, 1])] == ["1 worker", "32 workers", "3, then 2, then 1 worker"]
    assert units.count(1, "push", "pushes") == "1 push" and units.count(2000, "push", "pushes") == "2,000 pushes"
