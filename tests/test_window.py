"""The window's rules: single cases, and random histories against laws that always hold."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from asyncexec.errors import AsyncExecError, CallError, ExecutorBusy, ExecutorClosed, ReplyLost, StepTimeout
from asyncexec.window import Call, Complete, Decision, Fail, Send, Take, Window


def step(wanted: Sequence[int] = (0,), ranks: Sequence[int] = (0, 1), timeout: float | None = None) -> Call:
    return Call("execute_model", ranks, wanted, slot=True, ordered=True, timeout=timeout)


def rpc(ranks: Sequence[int] = (0, 1), timeout: float | None = None) -> Call:
    return Call("load", ranks, ranks, slot=False, ordered=False, timeout=timeout)


def sent(decisions: list[Decision]) -> list[Call]:
    return [d.call for d in decisions if isinstance(d, Send)]


def completed(decisions: list[Decision]) -> list[Call]:
    return [d.call for d in decisions if isinstance(d, Complete)]


def taken(decisions: list[Decision]) -> list[tuple[Call, int, Any]]:
    return [(d.call, d.rank, d.output) for d in decisions if isinstance(d, Take)]


def failed(decisions: list[Decision]) -> list[tuple[Call, AsyncExecError]]:
    return [(d.call, d.error) for d in decisions if isinstance(d, Fail)]


def test_slots_bound_what_runs_and_the_queue_what_waits() -> None:
    window = Window(2, max_concurrent_batches=2, max_queued=1)
    calls = [step() for _ in range(3)]
    assert [len(sent(window.submit(call, 0))) for call in calls] == [1, 1, 0]
    with pytest.raises(ExecutorBusy, match="2 steps run and 1 wait"):
        window.submit(step(), 0)
    decisions = window.replied(0, 1, 1, "a")
    assert completed(decisions) == [calls[0]]
    assert sent(decisions) == [calls[2]]
    assert taken(decisions) == [(calls[0], 0, "a")]


def test_what_is_submitted_later_does_not_overtake() -> None:
    window = Window(2, 1, 9)
    first, second, load = step(), step(), rpc()
    assert sent(window.submit(first, 0)) == [first]
    assert sent(window.submit(second, 0)) == sent(window.submit(load, 0)) == []
    assert sent(window.replied(0, 1, 1, None)) == [second, load]


def test_steps_complete_in_order() -> None:
    window = Window(2, 2, 0)
    every, first_only = step(wanted=(0, 1)), step(wanted=(0,))
    window.submit(every, 0)
    window.submit(first_only, 0)
    window.replied(0, 1, 1, None)
    assert completed(window.replied(0, 2, 1, None)) == []  # done, but the step before is not
    assert completed(window.replied(1, 1, 1, None)) == [every, first_only]


def test_a_step_that_waits_for_an_earlier_one_keeps_its_deadline_and_is_not_forgotten() -> None:
    window = Window(2, 3, 0)
    stuck, timed, held = step(wanted=(0, 1)), step(timeout=1.0), step()
    for call in (stuck, timed, held):
        window.submit(call, 0)
    window.replied(0, 1, 1, None)
    window.replied(0, 2, 1, None)
    window.replied(0, 3, 1, None)
    [(call, error)] = failed(window.expire(1.0))
    assert call is timed
    assert "those of a call before it had not" in str(error)
    decisions = window.fail(lambda call: ExecutorClosed("closed"))
    assert completed(decisions) == [stuck, timed, held]
    assert [call.has_outputs for call in completed(decisions)] == [False, True, True]
    assert [call for call, _ in failed(decisions)] == [stuck]


def test_the_first_error_fails_the_call_and_the_slot_waits_for_the_rest() -> None:
    window = Window(2, 1, 5)
    call, following = step(wanted=(0, 1)), step()
    window.submit(call, 0)
    window.submit(following, 0)
    errors = [CallError("first"), CallError("second")]
    decisions = window.errored(1, 1, 1, errors[0])
    assert failed(decisions) == [(call, errors[0])]
    assert sent(decisions) == []
    decisions = window.errored(0, 1, 1, errors[1])
    assert failed(decisions) == []
    assert completed(decisions) == [call], "the aggregator must hear of what others had to say"
    assert not call.has_outputs
    assert errors[0].others == [errors[1]]
    assert sent(decisions) == [following]


def test_an_error_of_a_rank_that_owes_nothing_fails_the_call() -> None:
    window = Window(2, 1, 0)
    call = step(wanted=(0,))
    window.submit(call, 0)
    error = CallError("unasked")
    assert failed(window.errored(1, 1, 1, error)) == [(call, error)]
    assert completed(window.replied(0, 1, 1, None)) == [call]
    assert not call.has_outputs
    assert window.has_room


def test_a_skipped_call_waits_for_its_reason() -> None:
    window = Window(2, 1, 0)
    call = step(wanted=(1,))
    window.submit(call, 0)
    assert window.skipped(1, 1, 1) == []
    assert not window.has_room
    assert failed(window.errored(0, 1, 1, CallError("why")))[0][0] is call
    assert window.has_room


def test_a_deadline_fails_the_caller_alone() -> None:
    window = Window(2, 1, 5)
    running, queued = step(wanted=(0, 1), timeout=1.0), step(timeout=2.0)
    window.submit(running, 10.0)
    window.submit(queued, 10.0)
    assert window.next_deadline == 11.0
    assert window.expire(10.9) == []
    [(call, error)] = failed(window.expire(11.0))
    assert call is running
    assert isinstance(error, StepTimeout)
    assert error.waiting_for == (0, 1)
    [(call, error)] = failed(window.expire(13.0))
    assert call is queued
    assert isinstance(error, StepTimeout)
    assert error.waiting_for == ()
    window.replied(0, 1, 1, "late")
    assert completed(window.replied(1, 1, 1, "late")) == [running], "the aggregator must still hear of it"
    assert running.answered
    assert window.has_room
    assert window.next_deadline is None


def test_a_later_reply_proves_an_earlier_one_lost() -> None:
    window = Window(1, 2, 0)
    lost, answered = step(ranks=(0,)), step(ranks=(0,))
    window.submit(lost, 0)
    window.submit(answered, 0)
    decisions = window.replied(0, 2, 1, "b")
    [(call, error)] = failed(decisions)
    assert call is lost
    assert isinstance(error, ReplyLost)
    assert completed(decisions) == [lost, answered]
    assert not lost.has_outputs
    assert window.replied(0, 1, 1, "a") == []
    assert (window.counters.lost, window.counters.late) == (1, 1)


def test_late_duplicate_unknown_and_foreign_replies_are_counted() -> None:
    window = Window(2, 1, 0)
    window.submit(step(wanted=(0, 1)), 0)
    window.replied(0, 1, 1, None)
    assert window.replied(0, 1, 1, None) == []  # a duplicate
    assert window.replied(0, 99, 1, None) == []  # unknown
    assert window.replied(0, 1, 7, None) == []  # another epoch
    assert (window.counters.late, window.counters.wrong_epoch) == (2, 1)


def test_failing_answers_everybody_and_begins_a_new_epoch() -> None:
    window = Window(2, 1, 5)
    calls = [step(), step(), rpc()]
    for call in calls:
        window.submit(call, 0)
    decisions = window.fail(lambda call: ExecutorClosed(str(call.call_id)))
    assert [(c, str(e)) for c, e in failed(decisions)] == list(zip(calls, "123", strict=True))
    assert window.replied(0, 1, 1, None) == []
    assert window.counters.wrong_epoch == 1
    assert sent(window.submit(step(), 0))


def test_an_acknowledged_call_is_done_when_everybody_is() -> None:
    window = Window(2, 1, 0)
    call = step(wanted=(0,))
    call.acknowledging = (1,)
    window.submit(call, 0)
    assert window.acknowledged(0, 1, 1) == []  # its output is owed
    assert taken(window.replied(0, 1, 1, "a")) == [(call, 0, "a")]
    assert not window.has_room
    assert window.replied(1, 1, 1, "b") == []  # its output is not wanted
    assert window.counters.late == 2
    assert completed(window.acknowledged(1, 1, 1)) == [call]


@pytest.mark.parametrize("first", ["deadline", "skipped"])
def test_a_skipped_call_that_nobody_explains_ends_with_its_deadline(first: str) -> None:
    window = Window(2, 1, 0)
    call = step(timeout=1)
    window.submit(call, 0)
    events: list[Callable[[], list[Decision]]] = [lambda: window.expire(1), lambda: window.skipped(0, 1, 1)]
    decisions = [decision for event in (events if first == "deadline" else events[::-1]) for decision in event()]
    assert [c for c, _ in failed(decisions)] == [call]
    assert window.has_room


class Histories(RuleBasedStateMachine):
    """Ranks that answer in order, lose answers, fail and repeat themselves, on a clock that moves by itself."""

    @initialize(world=st.integers(1, 4), slots=st.integers(1, 4), queue=st.integers(0, 4))
    def begin(self, world: int, slots: int, queue: int) -> None:
        self.world, self.slots, self.max_queued = world, slots, queue
        self.window = Window(world, slots, queue)
        self.now = 0.0
        self.calls: list[Call] = []
        self.at_rank: list[list[Call]] = [[] for _ in range(world)]
        self.sent: list[Call] = []
        self.taken: list[tuple[Call, int]] = []
        self.completed: list[Call] = []
        self.answers: dict[Call, int] = {}

    def note(self, decisions: list[Decision]) -> None:
        for decision in decisions:
            call = decision.call
            if isinstance(decision, Send):
                self.sent.append(call)
                for rank in call.ranks:
                    self.at_rank[rank].append(call)
            elif isinstance(decision, Take):
                self.taken.append((call, decision.rank))
                assert decision.rank in call.wanted
                assert call not in self.completed, "a reply came after the end"
            else:
                if isinstance(decision, Complete):
                    assert call in self.sent
                    assert call.answered or {rank for c, rank in self.taken if c is call} == set(call.wanted)
                    self.completed.append(call)
                if isinstance(decision, Fail) or not call.answered:
                    self.answers[call] = self.answers.get(call, 0) + 1

    @rule(
        data=st.data(),
        everywhere=st.booleans(),
        acknowledge=st.booleans(),
        timeout=st.one_of(st.none(), st.floats(0.1, 5)),
    )
    def submit_step(self, data: st.DataObject, everywhere: bool, acknowledge: bool, timeout: float | None) -> None:
        wanted = range(self.world) if everywhere else [data.draw(st.integers(0, self.world - 1))]
        call = step(list(wanted), list(range(self.world)), timeout)
        if acknowledge:
            call.acknowledging = [rank for rank in range(self.world) if rank not in wanted]
        busy = not self.window.has_room and sum(c.slot for c in self.waiting()) >= self.max_queued
        try:
            self.note(self.window.submit(call, self.now))
        except ExecutorBusy:
            assert busy
        else:
            assert not busy
            self.calls.append(call)

    @rule(data=st.data(), timeout=st.one_of(st.none(), st.floats(0.1, 5)))
    def submit_rpc(self, data: st.DataObject, timeout: float | None) -> None:
        ranks = data.draw(st.lists(st.integers(0, self.world - 1), min_size=1, unique=True))
        call = rpc(sorted(ranks), timeout)
        self.note(self.window.submit(call, self.now))
        self.calls.append(call)

    @precondition(lambda self: any(self.at_rank))
    @rule(data=st.data(), what=st.sampled_from(["reply", "error", "lose", "twice", "skip"]))
    def rank_answers(self, data: st.DataObject, what: str) -> None:
        rank = data.draw(st.sampled_from([r for r in range(self.world) if self.at_rank[r]]))
        call = self.at_rank[rank].pop(0)
        place = rank, call.call_id, call.epoch
        if what == "error":
            self.note(self.window.errored(*place, CallError("raised")))
        elif what == "skip" and call.ordered:
            self.note(self.window.skipped(*place))
        elif what != "lose":
            for _ in range(1 + (what == "twice")):
                self.answer(rank, call)

    def answer(self, rank: int, call: Call) -> None:
        place = rank, call.call_id, call.epoch
        if rank in call.wanted:
            self.note(self.window.replied(*place, rank))
        elif rank in call.acknowledging:
            self.note(self.window.acknowledged(*place))

    @rule(seconds=st.floats(0, 3))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds
        self.note(self.window.expire(self.now))

    def waiting(self) -> list[Call]:
        return [call for call in self.calls if not call.was_sent and not call.settled]

    @invariant()
    def the_rules_hold(self) -> None:
        if not hasattr(self, "window"):
            return
        running = [call for call in self.calls if call.was_sent and not call.settled]
        assert sum(call.slot for call in running) <= self.slots
        assert self.window.in_flight >= len(running)
        assert self.window.queued == len(self.waiting())
        assert all(count == 1 for count in self.answers.values()), "a caller was answered twice"
        ids = [call.call_id for call in self.sent]
        assert ids == sorted(ids), "a call overtook another"
        steps = [call.call_id for call in self.completed if call.ordered]
        assert steps == sorted(set(steps)), "a step was aggregated twice or out of order"
        due = self.window.next_deadline
        assert due is None or due > self.now

    def teardown(self) -> None:
        if not hasattr(self, "window"):
            return
        for rank in range(self.world):  # the ranks answer all that they still have
            while self.at_rank[rank]:
                self.answer(rank, self.at_rank[rank].pop(0))
        self.note(self.window.fail(lambda call: ExecutorClosed("the end")))
        assert set(self.answers) == set(self.calls), "a caller was never answered"
        assert len(self.taken) == len(set(self.taken)), "a reply was taken twice"
        assert len(self.completed) == len(self.sent), "a call that was sent was not completed, or twice"
        assert set(self.completed) == set(self.sent)
        assert not self.window.in_flight + self.window.queued


Histories.TestCase.settings = settings(max_examples=150, stateful_step_count=40)
test_random_histories = Histories.TestCase
