"""Each piece of advice that speaks of who waits for whom, on a run where it is right and on one where it is not."""

import msgspec
import pytest
from test_compare import make_summary as make_compared
from test_report import PUSHES, T0, make_pushes, make_run, write_log

from asgd_mpi.record.bubble import Pipelines
from asgd_mpi.record.events import End, Interval, Start
from asgd_mpi.record.summary import summarize
from asgd_mpi.record.unit import counted, one_of
from asgd_mpi.report import advice, units
from asgd_mpi.report.advice import advise
from asgd_mpi.report.answers import answers, without_waits
from asgd_mpi.report.brief import brief
from asgd_mpi.report.compare import compare
from asgd_mpi.report.cost import price


def make_summary(path, config=(), **phases):
    """A run on one host of CPUs, whose workers' seconds are those of `phases`; `server_*`: those of rank 0."""
    summary = summarize(make_run(path / "run", make_pushes()))
    for rank in summary.ranks:
        rank.host, rank.device = "node0", "cpu"
        own = {
            name: phases.get(name if rank.rank else f"server_{name}", 0.0) for name in rank.phases
        }
        rank.phases, rank.seconds = own, sum(own.values()) or rank.seconds
    for worker in summary.workers:
        worker.host, worker.device = "node0", "cpu"
    server = summary.ranks[0]
    return msgspec.structs.replace(
        summary,
        config=dict(config),
        apply_s=server.phases["apply"] / server.counts["pushes"],
        server_busy=server.phases["apply"] / server.seconds if server.seconds else 0.0,
    )


def said(summary):
    return " ".join(advise(summary))


LONG_PUSH = {"compute": 4.0, "push": 6.0, "server_apply": 1.0, "server_idle": 9.0}


def test_a_wait_in_push_is_for_a_core_on_one_host_and_for_the_message_on_several(tmp_path):
    summary = make_summary(tmp_path, **LONG_PUSH)
    assert "they wait for a core. All 4 ranks compute on its CPUs" in said(
        summary
    ) and "message" not in said(summary)
    for cores, is_enough in ((3, False), (4, True)):  # of four threads
        summary.cores = {"node0": cores}
        assert ("4 cores are enough for 4 threads" in said(summary)) == is_enough
        assert ("they wait for a core" in said(summary)) != is_enough
    assert "the server is busy only" not in said(msgspec.structs.replace(summary, alone=True))
    summary.ranks[2].host = "node1"
    assert "they wait for the message to travel" in said(summary) and "for a core" not in said(
        summary
    )


def test_under_a_rule_that_waits_the_wait_is_for_the_slowest_worker(tmp_path):
    summary = make_summary(tmp_path, {"rule.name": "sync"}, **LONG_PUSH)
    summary.ranks[1].counts["pushes"] = summary.ranks[2].counts["pushes"] = summary.ranks[3].counts[
        "pushes"
    ] = 20
    assert "under sync they wait there for each other. No one of them is much slower" in said(
        summary
    )
    summary.ranks[2].phases["compute"] = 20.0
    assert "Rank 2 takes 1 s for a step, the median is 200 ms" in said(
        summary
    ) and "for a core" not in said(summary)
    summary.config["rule.name"] = "asgd"
    assert "they wait for a core" in said(summary) and "each other" not in said(summary)


def test_who_waits_for_the_other_servers_waits_for_no_core_and_the_server_has_less_room(tmp_path):
    summary = make_summary(tmp_path, **LONG_PUSH | {"compute": 3.0, "push": 7.0})
    alone = [text for text in advise(summary) if "It can serve about" in text]
    summary.ranks[0].phases |= {"servers": 4.0, "idle": 5.0}
    text = said(summary)
    assert (
        "Rank 0 waits 40 % of its time for the other servers" in text and "for a core" not in text
    )
    pushes = summary.ranks[0].counts["pushes"]
    steps = sum(rank.phases["compute"] for rank in summary.ranks) / sum(
        rank.counts["pushes"] for rank in summary.ranks[1:]
    )
    limit = int(1 + steps / (5.0 / pushes))
    assert (
        f"about {units.count(limit, 'worker')} like" in text
        and "with the wait for the other servers" in text
    )
    assert f"about {units.count(int(1 + steps / (1.0 / pushes)), 'worker')} like" in alone[0]


def test_nobody_waits_for_a_straggler_but_under_a_rule_that_waits(tmp_path):
    summary = make_summary(tmp_path, compute=1.0)
    assert "Nobody waits for them" in said(summary) and "with the stalest gradients" in said(
        summary
    )
    summary.config["rule.name"] = "ssp"
    assert "The others wait for them" in said(summary)
    summary.workers[0].mean_staleness = 99.0
    assert "stalest" not in said(summary)


def test_a_worker_that_validates_or_was_retired_is_no_straggler(tmp_path):
    run = make_run(tmp_path / "run", make_pushes())
    assert [worker.rank for worker in summarize(run).stragglers] == [3]
    # most of its time
    write_log(run.metrics_of(3), [Interval(T0 + 100, T0 + 200, validate=100.0)])
    assert not summarize(run).stragglers


def test_a_larger_batch_is_advised_in_images_a_batch_not_a_push(tmp_path):
    summary = make_summary(
        tmp_path,
        {"data.batch_size": 5, "exchange.n_push": 2},
        compute=1.0,
        server_apply=9.5,
        server_idle=0.5,
    )
    assert "--data.batch_size 10)" in said(summary) and "More workers will not help" in said(
        summary
    )


def test_the_clocks_of_other_hosts_do_not_move_the_beginning_of_a_run(tmp_path):
    run = make_run(tmp_path / "run", make_pushes())
    right = summarize(run)
    run.metrics_of(2).unlink()
    behind = 1000.0
    write_log(
        run.metrics_of(2),
        [
            Start(
                T0 + 0.2 - behind,
                2,
                "worker",
                "node1",
                "cuda:0",
                3,
                1000,
                120,
                600,
                clock_offset_s=behind,
            ),
            Interval(T0 - behind, T0 + 1 - behind, compute=1.0),
            End(T0 + 8 - behind, "finished"),
        ],
    )
    found = summarize(run)
    assert (found.started, found.training_s, found.duration_s) == pytest.approx(
        (right.started, right.training_s, right.duration_s)
    )


def test_a_stage_is_a_gpu_and_a_rank_that_was_killed_before_the_last_start_is_no_problem(tmp_path):
    run = make_run(tmp_path / "run", make_pushes())
    write_log(run.metrics_of(4), [Start(T0, 4, "stage", "node0", "cuda:0", 3, 1000)])
    cost = price(summarize(run), 1.0)
    assert cost.num_gpus == 4 and cost.gpu_hours == pytest.approx(
        4 * summarize(run).duration_s / 3600
    )
    assert "no End event from rank 4" in " ".join(summarize(run).problems)
    for rank in range(3):
        write_log(
            run.metrics_of(rank, 1),
            [
                Start(T0 + 100, rank, "worker" if rank else "server", "node0", "cuda:0", 2, 1000),
                Interval(T0 + 100, T0 + 110, idle=10.0),
                End(T0 + 110, "finished"),
            ],
        )
    found = summarize(run)
    assert not any(
        "rank 4" in problem or "rank 3" in problem for problem in found.problems
    ) and found.crews == [3, 2]
    assert price(found, 3600.0).total == pytest.approx(4 * 8 + 2 * 10) and price(
        found, 3600.0, num_gpus=1
    ).total == pytest.approx(18)


def test_no_speed_up_is_told_that_was_not_measured(tmp_path):
    several = [
        make_compared(tmp_path / str(number), number, 100.0 * number, [0.5, 0.3, 0.1])
        for number in (3, 4)
    ]
    found = compare(several)
    assert {entry.speedup for entry in found.entries} == {None} == {
        entry.efficiency for entry in found.entries
    } and found.fit is None
    assert (
        "No run had one worker" in found.sentences[0] and "No limit is fitted" in found.sentences[1]
    )
    one = make_compared(tmp_path / "1", 1, 125.0, [0.5, 0.3, 0.1])
    found = compare([*several, one])
    assert [entry.speedup for entry in found.entries] == pytest.approx(
        [1.0, 2.4, 3.2]
    ) and found.fit
    several[0].restarts = [
        *several[0].restarts,
        msgspec.structs.replace(several[0].restarts[0], restart=1, num_workers=2),
    ]
    found = compare([*several, one])
    assert [entry.speedup for entry in found.entries] == [
        1.0,
        None,
        pytest.approx(3.2),
    ] and found.fit is None
    assert "had different numbers of workers" in found.sentences[0]
    assert any("From 1 to 4 workers" in text for text in found.sentences)
    assert not any("to 3 workers" in text for text in compare([several[0], one]).sentences)


def test_two_and_two_point_nought_are_one_setting(tmp_path):
    runs = [
        make_compared(
            tmp_path / str(number),
            1,
            100.0,
            [0.5, 0.3],
            settings={"schedule.warmup_epochs": value, "schedule.lr": lr},
        )
        for number, (value, lr) in enumerate([(2, 0.1), (2.0, 0.10000001)])
    ]
    assert compare(runs).differences == {"schedule.lr": ["0.1", "0.10000001"]}


def test_samples_are_counted_by_the_word_for_one_or_for_many():
    many = "images windows queries boxes batches classes phrases series movies digits".split()
    one = "image window query box batch class phrase series movie digit".split()
    assert [one_of(unit) for unit in many] == one
    assert [counted(number, "validation images") for number in (0, 1, 2)] == [
        "0 validation images",
        "1 validation image",
        "2 validation images",
    ]


def test_durations_and_counts_read_as_they_are_meant():
    assert [units.seconds(value) for value in (0.0714, 24, 125, 3725)] == [
        "0.07 s",
        "24.0 s",
        "2 min 05 s",
        "1 h 02 min 05 s",
    ]
    assert [units.workers(crews) for crews in ([1], [32], [3, 2, 1])] == [
        "1 worker",
        "32 workers",
        "3, then 2, then 1 worker",
    ]
    assert (
        units.count(1, "push", "pushes") == "1 push"
        and units.count(2000, "push", "pushes") == "2,000 pushes"
    )


def with_phases(summary, server=(), **shares):
    """The same run, whose workers spend such shares of 100 s each in their phases, `server` in those of rank 0."""
    for rank in summary.ranks:
        own = shares if rank.rank else dict(server) or {"apply": 0.1, "idle": 0.9}
        rank.seconds = 100.0
        rank.phases = dict.fromkeys(rank.phases, 0.0) | {k: 100.0 * v for k, v in own.items()}
    server = summary.ranks[0].phases
    return msgspec.structs.replace(
        summary,
        server_busy=(server["apply"] + server["checkpoint"]) / 100,
        apply_s=server["apply"] / summary.ranks[0].counts["pushes"],
    )


def stalled(summary, bubble, schedule="gpipe"):
    stages = Pipelines(2, 4, schedule, 0.2, bubble, [])
    return msgspec.structs.replace(summary, pipelines=stages)


def replaced(**changes):
    return lambda summary: msgspec.structs.replace(summary, **changes)


def phases(server=(), **shares):
    return lambda summary: with_phases(summary, server, **shares)


def violated(summary):
    summary.audit.violations = ["epoch 0: 1 samples repeated"]
    return summary


def evenly_fast(summary):
    for worker in summary.workers:
        worker.is_straggler = False
    return summary


def other_statistics(error):
    def change(summary):
        summary.validations[-1].top1_error, summary.validations[-1].stored_top1_error = 0.1, error
        return summary

    return change


def errors(*values):
    def change(summary):
        [score] = summary.validations[:1]
        scores = [
            msgspec.structs.replace(score, top1_error=error, made=T0 + number, epoch=float(number))
            for number, error in enumerate(values)
        ]
        return msgspec.structs.replace(summary, validations=scores, duration_s=8.0)

    return change


def scaled(pushes, **config):
    return replaced(scaled_pushes=pushes, mean_scale=0.5, config={"data.batch_size": 10} | config)


BUSY = {"apply": 0.9, "idle": 0.1}
# Of each piece of advice its first words, a run that it is right for, and one that it would be wrong for.
CASES = {
    "_audit": ("The record contradicts itself", violated, lambda summary: summary),
    "_saturated": (
        "More workers will not help",
        phases(BUSY, compute=0.5, push=0.5),
        phases(compute=0.5, push=0.5),
    ),
    "_servers": (
        "Rank 0 waits 40 % of its time for the other servers",
        phases({"apply": 0.1, "servers": 0.4, "idle": 0.5}, compute=1.0),
        phases({"apply": 0.4, "servers": 0.1, "idle": 0.5}, compute=1.0),
    ),
    # a busy server explains it better
    "_waiting": (
        "they wait for the message to travel",
        phases(compute=0.6, push=0.4),
        phases(BUSY, compute=0.6, push=0.4),
    ),
    "_bubble": (
        "wait for each other 40 % of the time that a batch takes",
        lambda summary: stalled(summary, 0.4),
        lambda summary: stalled(summary, 0.1),
    ),
    "_data": (
        "40 % of their time for images",
        phases(compute=0.6, data=0.4),
        phases(compute=0.9, data=0.1),
    ),
    "_fetch": (
        "Fetching the weights takes 40 %",
        phases(compute=0.6, fetch=0.4),
        phases(compute=0.9, fetch=0.1),
    ),
    "_lease": (
        "The workers are idle 40 %",
        phases(compute=0.6, idle=0.4),
        phases(compute=0.9, idle=0.1),
    ),
    "_validate": (
        "Validation takes 40 %",
        phases(compute=0.6, validate=0.4),
        phases(compute=0.9, validate=0.1),
    ),
    "_room": ("It can serve 12 workers", phases(compute=1.0), phases(BUSY, compute=1.0)),
    "_stragglers": ("Below half of the median speed", lambda summary: summary, evenly_fast),
    "_statistics": ("Batch norm: the accuracy is", other_statistics(0.2), other_statistics(0.1)),
    "_torn": (
        "were torn and done again",
        replaced(fetches=100, torn_reads=10),
        replaced(fetches=100, torn_reads=1),
    ),
    # the limit is the user's own
    "_scaled": (
        "of the gradients were scaled down",
        scaled(PUSHES),
        scaled(PUSHES, **{"rule.clip_norm": 1.0}),
    ),
    "_skipped": (
        "Left out: 3 damaged images",
        replaced(skipped_images=3),
        replaced(skipped_images=0),
    ),
    "_retries": (
        "Failed and repeated: 3 reads",
        replaced(read_retries=3),
        replaced(read_retries=0),
    ),
    "_plateau": (
        "No better since epoch",
        errors(0.5, 0.3, 0.1, 0.1, 0.1, 0.1),
        errors(0.5, 0.4, 0.3, 0.2, 0.15, 0.1),
    ),
}


def test_every_piece_of_advice_has_a_run_that_it_is_right_for_and_one_that_it_is_not():
    assert set(CASES) == {rule.__name__ for rule in (*advice.RULES, advice._plateau)}


@pytest.mark.parametrize("name", CASES)
def test_a_piece_of_advice_is_given_where_it_is_right_and_only_there(tmp_path, name):
    words, right, wrong = CASES[name]
    for number, (change, is_said) in enumerate(((right, True), (wrong, False))):
        summary = change(summarize(make_run(tmp_path / str(number), make_pushes())))
        assert (words in said(summary)) == is_said, said(summary)
        for piece in advice.pieces(
            summary
        ):  # where the change is the title, the text goes on from it
            assert not piece.change or piece.change.lower() not in piece.found.lower()
        change = answers(summary)[2]
        assert change.short.lower() not in change.text.lower(), change


def test_whether_more_workers_would_help_is_said_by_the_server_and_the_cores(tmp_path):
    summary = make_summary(tmp_path, compute=4.0, server_apply=2.0, server_idle=8.0)
    limit = int(
        1
        + 4.0
        * 3
        / sum(rank.counts["pushes"] for rank in summary.ranks[1:])
        / (2.0 / summary.ranks[0].counts["pushes"])
    )
    assert limit > 3
    assert advice.more_workers(summary).startswith(f"The server could serve about {limit} workers")
    assert f"More workers?   The server could serve about {limit} " in brief(summary)
    short_of_cores = make_summary(tmp_path / "cores", **LONG_PUSH)
    assert "Not on this host, whose cores are all taken" in advice.more_workers(short_of_cores)
    short_of_cores.cores = {"node0": 4}  # enough for four threads
    assert "Not on this host" not in advice.more_workers(short_of_cores)
    summary.ranks[0].phases["checkpoint"] = 3.0
    assert "of the time, mostly with checkpoints; one update takes" in said(summary)
    busy = make_summary(tmp_path / "busy", compute=4.0, server_apply=9.0, server_idle=1.0)
    assert advice.more_workers(busy) == "No: the server is busy 90 % of the time."
    full = make_summary(tmp_path / "full", compute=1.0, server_apply=7.0, server_idle=3.0)
    assert advice.more_workers(full) == "No: the server can serve about 1 worker like these."
    assert advice.more_workers(msgspec.structs.replace(full, ranks=[], server_busy=None)) == ""


def test_room_for_more_workers_is_told_from_many_pushes_and_no_further_than_four_times_those_of_the_run(
    tmp_path,
):
    summary = make_summary(tmp_path, compute=4.0, server_apply=0.001, server_idle=9.999)
    bounded = "12 workers like these or more (4 times those of this run, which tells no further)"
    assert f"The server could serve {bounded}, if" in advice.more_workers(summary)
    assert f"It can serve {bounded} before it is the limit" in said(summary)
    summary.ranks[0].counts["pushes"] = 3
    assert advice.more_workers(summary).startswith("That cannot be told from 3 pushes")
    assert "It can serve" not in said(summary)


def test_smaller_leases_are_advised_for_a_wait_as_long_as_a_lease_and_not_for_what_stood_still(
    tmp_path,
):
    summary = summarize(make_run(tmp_path / "run", make_pushes()))
    summary = with_phases(summary, compute=0.6, idle=0.4)
    each = max(60 / rank.counts["images"] for rank in summary.ranks[1:])
    long = int(40 / (2 * 10 * each)) + 1  # batches of the slowest worker, in half of the wait
    for batches, is_the_lease in ((long, True), (long - 1, False)):
        summary.settings = {"data.batch_size": 10, "data.lease_batches": batches}
        assert ("A smaller --data.lease_batches" in said(summary)) == is_the_lease
        assert ("it was not the leases" in said(summary)) != is_the_lease
    summary.ranks[2].phases |= {"compute": 99.0, "idle": 1.0}
    summary.settings["data.lease_batches"] = 1
    assert advice.foremost(advice.pieces(summary)).change.startswith("See what held rank 2 while")


@pytest.mark.parametrize("rule, waits", [("sync", True), ("sync_backup", True), ("asgd", False)])
def test_who_waits_for_a_straggler_follows_from_the_rule(tmp_path, rule, waits):
    summary = make_summary(tmp_path, {"rule.name": rule}, compute=1.0)
    assert ("The others wait for them" in said(summary)) == waits
    assert ("Nobody waits for them" in said(summary)) != waits


def test_the_one_thing_to_change_is_an_alarm_or_has_the_largest_gain(tmp_path):
    summary = with_phases(
        summarize(make_run(tmp_path / "run", make_pushes())), compute=0.5, data=0.3, fetch=0.2
    )
    summary = msgspec.structs.replace(
        evenly_fast(summary), config={"data.batch_size": 16}, torn_reads=0, skipped_images=0
    )
    found = advice.foremost(advice.pieces(summary))
    assert found.change.startswith("More --data.threads") and found.gain == pytest.approx(3 / 7)
    summary = with_phases(summary, compute=0.5, data=0.1, fetch=0.4)
    found = advice.foremost(advice.pieces(summary))
    assert (found.change, found.gain) == ("--data.batch_size 32", pytest.approx(0.4 / 1.6))
    assert advice.foremost(advice.pieces(violated(summary))).is_alarm
    summary.audit.violations = []
    # a later piece with a larger gain
    summary = with_phases(summary, compute=0.34, data=0.16, validate=0.5)
    found = advice.foremost(advice.pieces(summary))
    assert "--run.validate_every" in found.change and found.gain == pytest.approx(0.5 / 1.5)
    summary = with_phases(summary, compute=1.0)
    assert advice.foremost(advice.pieces(summary)) is None


def test_a_run_that_ended_before_its_first_push_is_not_told_to_change_nothing(tmp_path):
    summary = summarize(make_run(tmp_path / "run", []))
    _, right, change = answers(summary)
    assert right.text == "There is no applied push to audit."
    assert change.short == "Cannot be told" and change.state == "open"


def test_torn_reads_ask_for_a_slot_for_each_worker_and_two(tmp_path):
    summary = msgspec.structs.replace(
        summarize(make_run(tmp_path / "run", make_pushes())), fetches=100, torn_reads=10
    )
    slots = summary.num_workers + 2
    told = next(text for text in advise(summary) if "torn" in text)
    assert f"--exchange.ring {slots} keeps" in told
    summary.config["exchange.ring"] = slots
    told = next(text for text in advise(summary) if "torn" in text)
    assert told.endswith("done again.")


def test_the_answers_are_the_numbers_of_the_run(tmp_path):
    summary = evenly_fast(
        with_phases(summarize(make_run(tmp_path / "run", make_pushes())), compute=1.0)
    )
    summary.torn_reads = summary.skipped_images = 0
    fast, right, change = answers(summary)
    # 600 images in 100 s of computation of each of three workers
    free = sum(rank.counts["images"] / 100.0 for rank in summary.ranks[1:])
    assert without_waits(summary) == pytest.approx(free) == pytest.approx(6.0)
    assert fast.short == f"{summary.images_per_s:,.0f} images/s" and fast.state == "good"
    assert (
        right.short == "10.50 % accuracy" and "each applied once; 0 samples repeated" in right.text
    )
    assert (change.short, right.state) == ("Nothing", "good")
    assert answers(msgspec.structs.replace(summary, skipped_images=1))[1].state == "open"
    assert answers(msgspec.structs.replace(summary, status="unfinished"))[1].state == "open"
    failed = msgspec.structs.replace(summary, status="failed", reason="rank 2: gone")
    assert answers(failed)[1].state == "bad" and "rank 2: gone" in answers(failed)[1].text
    assert answers(violated(summary))[1].state == answers(summary)[2].state == "bad"
    summary.images_per_s = 0.4 * free
    assert (
        answers(summary)[0].state == "bad" and "40 % of the 6 images/s" in answers(summary)[0].text
    )
