"""Judges decide by the final answer, never hang, and never turn their own failure into a wrong answer."""

import asyncio
import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from fractions import Fraction
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from xmodal_opd.scoring.answers import equivalent, extract, option, same_answer, same_answers
from xmodal_opd.scoring.judge import build_judge, judge, verdict
from xmodal_opd.scoring.layouts import LAYOUTS
from xmodal_opd.scoring.quantities import numbers
from xmodal_opd.types import Pair, Rollout


def rollout(text: str, answer: str | None = None, key: str = "q0", question: str = "") -> Rollout:
    meta = {"question": question} if question else {}
    return Rollout(Pair(key, {}, answer, meta), tokens=[1], logps=[-1.0], text=text, finished=True, group=0)


# ---- answers


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("so \\boxed{7} but not 9", "7"),
        ("so \\boxed{\\frac{1}{2}}.", "1/2"),
        ("\\boxed{x^{2}+1}", "x^{2}+1"),
        ("first \\boxed{1}, then \\boxed{2", "1"),
        ("6 times 7.\n**Answer:** 42 apples", "42 apples"),
        ("The answer is 3 * 7 = 21 because 3 is three.", "21"),
        ("the final answer is: (C) because 4 > 3", "(C)"),
        ("I wonder what the answer is. 2 + 2 = 4", "4"),
        ("two plus three is five so answer five", "five"),
        ("work\n#### 1,234", "1,234"),
        ("the answer is St. Louis.", "St. Louis"),
        ("the answer is Paris. It is nice there in 2020.", "Paris"),
        ("(b)", "B"),
        ("B) Paris", "B"),
        ("(A) is too small, so 7", "7"),
        ("7 is too big, so option C", "C"),
        ("twenty one minus three is eighteen", "eighteen"),
        ("5-3 apples or 5 - 3", "3"),
        ("below zero: -12.5 degrees", "-12.5"),
        ("the last one", "the last one"),
        ("", None),
        (" \n", None),
    ],
)
def test_the_final_answer_is_found(text: str, answer: str | None):
    assert extract(text) == answer


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1,234,567.5", Fraction(2469135, 2)),
        ("3/4", Fraction(3, 4)),
        ("1 1/2", Fraction(3, 2)),
        (".5", Fraction(1, 2)),
        ("-3", -3),
        ("minus three", -3),
        ("zero", 0),
        ("twenty-one", 21),
        ("one hundred and five", 105),
        ("a hundred", 100),
        ("two thousand three hundred and forty-five", 2345),
        ("twelve million thirty thousand and six", 12_030_006),
        ("5 million", 5_000_000),
        ("three point one four", Fraction(157, 50)),
        ("two thirds", Fraction(2, 3)),
        ("one half", Fraction(1, 2)),
    ],
)
def test_numbers_are_read_in_digits_and_words(text: str, value: Fraction):
    assert [n.value for n in numbers(text)] == [value]


def test_two_numbers_side_by_side_stay_two():
    assert [int(n.value) for n in numbers("three and four, then five minus six; 2,3")] == [3, 4, 5, 6, 2, 3]


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ("Twenty-one apples!", "21 apples"),
        ("42 apples", "42"),
        ("$5", "5"),
        ("0.50", "1/2"),
        ("\\frac{3}{4}", "three quarters"),
        ("The Louvre.", "louvre"),
        ("(B) Paris", "b"),
        ("Paris", "B) Paris"),
        ("50\\%", "50"),
        ("\u22123", "-3"),
        ("x + 1", "x+1"),
    ],
)
def test_equal_answers_are_equal_both_ways(a: str, b: str):
    assert equivalent(a, b) and equivalent(b, a)


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ("15", "1.5"),
        ("-3", "3"),
        ("x+1", "x-1"),
        ("42 apples", "42 pears"),
        ("3 or 4", "4"),
        ("B", "C"),
        ("B) Paris", "B) Rome"),
        ("J. R. R. Tolkien", "J. K. Rowling"),
        ("", ""),
        ("1/0", "0"),
        ("(1, 2)", "[1, 2]"),
    ],
)
def test_different_answers_are_different_both_ways(a: str, b: str):
    assert not equivalent(a, b) and not equivalent(b, a)


def test_only_an_answer_of_the_kind_looked_for_is_guessed():
    assert not same_answer("The capital is Paris, founded in 52", "Rome")
    assert same_answer("Of the 4 choices I take B", "B")
    assert same_answer("There are 4 and 5, so nine", "9")


def test_a_word_looked_for_may_be_what_a_sentence_says():
    assert same_answer("The capital of India is New Delhi.", "New Delhi")
    assert same_answer("The chemical symbol for potassium is K.", "K")
    assert not same_answer("The capital of France is Paris.", "France")
    assert not same_answer("It is Paris. It is big.", "Paris") and not same_answer("It is Paris, not Rome.", "Rome")
    assert same_answer("The sky is blue.", "The sky is blue") and not same_answer("Blue is blue.", "The sky is blue")


def test_an_article_is_not_an_option():
    assert option("A dog") is None and option("I think so") is None and option("a") == ("A", "")


@pytest.mark.parametrize("text", ["answer ", "answer is ", "a hundred ", "1 ", "\\boxed{", "1,111,", "- ", "one "])
def test_a_response_that_repeats_itself_is_read_in_bounded_time(text: str):
    began = time.process_time()
    same_answer(text * 5000, "3")
    assert time.process_time() - began < 5  # 0.1 s; minutes when a rule looks ahead without a bound


def test_a_number_of_thousands_of_digits_is_no_trouble():
    assert not same_answer("9" * 5000, "9") and same_answer("9" * 5000, "9" * 5000)


# ---- match


def test_match_compares_with_the_answer_of_the_shard():
    rollouts = [rollout("so answer nine", "9"), rollout("so answer ten", "9"), rollout("", "9")]
    assert judge(build_judge("match"), rollouts) == ([1.0, 0.0, 0.0], {})


def test_match_compares_with_the_models_own_answer_when_there_is_one():
    rollouts = [rollout("I say 7", "9"), rollout("it is nine", "9")]
    assert judge(build_judge("match"), rollouts, ["2 + 5 = 7", "2 + 5 = 7"])[0] == [1.0, 0.0]
    assert judge(build_judge({"match": {"to": "answer"}}), rollouts, ["7", "7"])[0] == [0.0, 1.0]


@pytest.mark.parametrize("reference", ["", "  ", None])
def test_a_reference_without_an_answer_rewards_nobody_and_is_no_failure(reference: str | None):
    assert judge(build_judge("match"), [rollout("7"), rollout("")], [reference] * 2) == ([0.0, 0.0], {})


@pytest.mark.parametrize("answer", [None, " "])
def test_a_sample_without_an_answer_is_named(answer: str | None):
    with pytest.raises(ValueError, match="'q7' has none"):
        judge(build_judge("match"), [rollout("7", "7"), rollout("7", answer, "q7")])


def test_comparing_with_a_reference_nobody_sampled_says_what_to_set():
    with pytest.raises(ValueError, match=r"judge\.reference"):
        judge(build_judge({"match": {"to": "reference"}}), [rollout("7", "7")])


def test_mathematics_is_compared_as_mathematics_also_on_a_thread():
    pytest.importorskip("math_verify")
    pairs = [
        ("so \\boxed{x^2+2x+1}", "(x+1)^2"),
        ("the answer is \\sqrt{8}", "2\\sqrt{2}"),
        ("\\boxed{(1, 2)}", "[1, 2]"),
        ("\\boxed{\\frac{", "1"),
        ("silent", "listen"),  # as products of letters they are equal
    ]
    with ThreadPoolExecutor(1) as thread:
        assert thread.submit(same_answers, pairs, True).result() == [True, True, False, False, False]
    assert same_answers(pairs[:1], maths=False) == [False]


def test_mathematics_that_takes_for_ever_is_undecided_and_the_rest_is_not():
    pytest.importorskip("math_verify")
    rollouts = [rollout("\\boxed{9^{9^{9^9}}}", "9^{9^{9}}+1"), rollout("\\boxed{2^{3}}", "8"), rollout("5", "8")]
    rewards, failures = judge(build_judge({"match": {"maths": True}}), rollouts)
    assert rewards == [None, 1.0, 0.0] and failures == {"mathematics took too long": 1}


# ---- accuracy_format

TAGGED = "<think>so</think> <answer>{}</answer>"


@pytest.mark.parametrize(
    ("text", "gold", "value"),
    [
        (TAGGED.format("12"), "$12$", 1.5),
        (TAGGED.format("13"), "$12$", 0.5),
        (TAGGED.format("\\frac{1}{2}"), "$0.5$", 1.5),
        (TAGGED.format("x^2+2x+1"), "$(x+1)^2$", 1.5),  # only mathematics knows
        (TAGGED.format("Paris"), "Paris", 1.5),  # math-verify reads no gold here: not a point for everybody
        (TAGGED.format("Rome"), "Paris", 0.5),
        ("Hm. " + TAGGED.format("12") + " Yes.", "12", 1.5),  # text around is tolerated
        ("<think>so</think>\n\n<answer>\n12\n</answer>", "12", 1.5),  # not on one line: what follows the tag
        ("<answer>12</answer>", "12", 1.0),
        ("<think></think><answer>12</answer>", "12", 1.0),
        ("<answer>12</answer><think>so</think>", "12", 1.0),
        ("<think>so</think> hence <answer>12</answer>", "12", 1.0),
        ("<think>so</think><answer>9</answer> or <answer>12</answer>", "9", 1.0),
        ("<think>so</think><answer></answer>", "12", 0.0),
        ("<think>so</think><answer>it is 12", "12", 1.0),
        ("the answer is 12", "12", 1.0),  # no tag: all of it
        ("", "12", 0.0),
        (" \n", "12", 0.0),
        (TAGGED.format("(B) 4 cm"), "B", 1.5),
        (TAGGED.format("C"), "B", 0.5),
        (TAGGED.format("In my opinion it is B"), "b", 1.5),
        (TAGGED.format("option B, or option C"), "b", 0.5),  # two letters
        (TAGGED.format("both"), "B", 1.5),  # as published: a letter inside a word is a letter
        (TAGGED.format("The correct option is B."), "$B$", 1.5),
        (TAGGED.format("The answer is b"), "B", 1.5),
        (TAGGED.format("(B) Point C"), "B", 1.5),
        (TAGGED.format("\\text{B}"), "B", 1.5),
        (TAGGED.format("A, B, C, D"), "D", 0.5),
        (TAGGED.format("A or B"), "B", 0.5),
        (TAGGED.format("A) 1, B) 2, C) 3"), "A", 0.5),
        (TAGGED.format("1, 2, 3, 4, 5"), "5", 0.5),
        (TAGGED.format("4 or five"), "5", 0.5),
        (TAGGED.format("1, 2, 3"), "1, 2, 3", 1.5),
        (TAGGED.format("\\{1, 3\\}"), "$\\{3, 1\\}$", 1.5),  # a set, if mathematics says so
        (TAGGED.format("2 and 3 make 5"), "5", 1.5),
        (TAGGED.format("1,005 or so, exactly 1,005"), "1005", 1.5),
    ],
)
def test_accuracy_and_format_of_tagged_answers(text: str, gold: str, value: float):
    pytest.importorskip("math_verify")
    assert judge(build_judge("accuracy_format"), [rollout(text, gold)]) == ([value], {})


@pytest.mark.parametrize(
    ("text", "gold", "value"),
    [
        ("two plus three is five. answer: five", "5", 1.25),
        ("two plus three is five.\nAnswer: 5\n", "5", 1.25),
        ("two plus three is six. answer: six", "5", 0.25),
        ("answer: five", "5", 1.0),  # no reasoning
        ("answer: six, answer: five", "5", 1.0),
        ("it is five. answer: five\nor so", "5", 1.0),
        ("it is five", "5", 1.0),
        ("it is five. answer:", "5", 0.0),
        ("", "5", 0.0),
    ],
)
def test_accuracy_and_format_of_marked_answers(text: str, gold: str, value: float):
    spec = {"accuracy_format": {"layout": "marker", "format": 0.25, "maths": False}}
    assert judge(build_judge(spec), [rollout(text, gold)]) == ([value], {})


def test_a_reward_with_format_is_undecided_where_mathematics_takes_for_ever():
    pytest.importorskip("math_verify")
    rollouts = [rollout(TAGGED.format("9^{9^{9^9}}"), "9^{9^{9}}+1"), rollout(TAGGED.format("8"), "2^{3}")]
    assert judge(build_judge("accuracy_format"), rollouts) == ([None, 1.5], {"mathematics took too long": 1})


@pytest.mark.parametrize("text", ["<think>", "<answer>", "answer: ", "<think></think>", "a\n", " "])
def test_a_layout_is_read_in_bounded_time(text: str):
    began = time.process_time()
    for layout in LAYOUTS.values():
        layout.kept(text * 20_000), layout.answer(text * 20_000)
    assert time.process_time() - began < 2


# ---- self


@pytest.mark.parametrize(
    ("reply", "value"),
    [("1", 1.0), (" 0.", 0.0), ("Answer: **1**", 1.0), ("<think>0 or 1? 0</think> 1", 1.0), ("1 or 0", None),
     ("", None), ("yes", None), ("<think>1", None), ("10", None), ("0.1", None), ("2", None), ("1 1 1", 1.0)],
)  # fmt: skip
def test_a_reply_is_one_zero_or_nothing(reply: str, value: float | None):
    assert verdict(reply) == value


def test_the_model_judges_itself_once_per_question():
    asked: list[str] = []

    def ask(prompts: list[str]) -> list[str]:
        asked.extend(prompts)
        return ["1" if "say seven" in p else "0" if "say eight" in p else "hm" for p in prompts]

    rollouts = [rollout(t, question="What?") for t in ("I say seven", "I say eight", "I say so", "I say seven", "")]
    rewards, failures = judge(build_judge("self", ask), rollouts, ["It is 7"] * 5)
    assert rewards == [1.0, 0.0, None, 1.0, 0.0] and failures == {"reply is neither 1 nor 0": 1}
    assert len(asked) == 3 and all("What?" in p and "It is 7" in p for p in asked)


def test_self_without_a_model_says_so():
    with pytest.raises(ValueError, match="needs the run's model"):
        build_judge("self")


# ---- your own


def mine(prompts, completions, answer, **columns):
    return [float(c == a) for c, a in zip(completions, answer, strict=True)]


async def mine_later(prompts, completions, bonus=0.0, **columns):
    await asyncio.sleep(0.01)
    return [bonus + len(c) for c in completions]


def not_a_reward(prompts, completions):
    return [0.0 for _ in completions]


def test_a_trl_reward_of_ones_own_is_used_sync_and_async():
    rollouts = [rollout("7", "7"), rollout("12", "7")]
    assert judge(build_judge(f"{__name__}:mine"), rollouts)[0] == [1.0, 0.0]
    assert judge(build_judge({f"{__name__}:mine_later": {"bonus": 10}}), rollouts)[0] == [11.0, 12.0]


def test_an_async_judge_runs_on_a_thread_while_a_loop_runs_here():
    async def main() -> Any:
        return await asyncio.to_thread(judge, build_judge(f"{__name__}:mine_later"), [rollout("7")])

    assert asyncio.run(main())[0] == [1.0]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("macth", "did you mean 'match'"),
        ({"match": {"too": "answer"}}, "did you mean 'to'"),
        ("llm", "needs a value for model"),
        ({"llm": {"model": "m", "url": "localhost:8000"}}, "cannot ask 'localhost:8000'"),
        ({"llm": {"model": "m", "api_key_env": "NO_SUCH_VARIABLE"}}, "'NO_SUCH_VARIABLE', which is unset"),
        ({"accuracy_format": {"format": 1.0}}, "a reward of 1 means right"),
        ("no_such_module:reward", "cannot load judge"),
        (f"{__name__}:not_a_reward", "must be a TRL reward"),
    ],
)
def test_a_judge_that_cannot_be_built_says_why(spec: Any, message: str):
    with pytest.raises(ValueError, match=message):
        build_judge(spec)


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        ([1.0], "returned 1 rewards for 2 completions"),
        (1.0, "returned float, not a list"),
        ("10", "returned str, not a list"),
        (["1", 0.0], "returned '1' for sample 'q0'"),
        ([0.0, float("inf")], "returned inf for sample 'q1'"),
    ],
)
def test_what_is_not_a_reward_is_refused_by_name(returned: Any, message: str):
    with pytest.raises(ValueError, match=f"judge 'odd' {message}"):

        def odd(prompts, completions, **columns):
            return returned

        judge(odd, [rollout("a", key="q0"), rollout("b", key="q1")])


def test_none_and_nan_are_counted_not_zero():
    rewards, failures = judge(lambda **_: [None, float("nan"), True, 2], [rollout("a")] * 4)
    assert rewards == [None, None, 1.0, 2.0] and failures == {"undecided": 2}


def test_an_exception_of_the_judge_is_not_swallowed():
    with pytest.raises(ZeroDivisionError):
        judge(lambda **_: [1 / 0], [rollout("a")])


# ---- llm, against a real server


@dataclass
class Seen:
    """What the server was asked, and what it shall do."""

    behave: Callable[["Seen", Any, dict], None]
    url: str = ""
    bodies: list[dict] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    now: int = 0
    most: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)
    closing: threading.Event = field(default_factory=threading.Event)


@contextmanager
def server(behave: Callable[[Seen, Any, dict], None]) -> Iterator[Seen]:
    seen = Seen(behave)

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with seen.lock:
                seen.bodies.append(body)
                seen.headers.append(dict(self.headers))
                seen.now += 1
                seen.most = max(seen.most, seen.now)
            try:
                seen.behave(seen, self, body)
            except (BrokenPipeError, ConnectionResetError):
                self.close_connection = True
            finally:
                with seen.lock:
                    seen.now -= 1

        def log_message(self, *_: Any) -> None:
            """Quiet."""

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    http.daemon_threads = False
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    seen.url = f"http://127.0.0.1:{http.server_address[1]}/v1"
    try:
        yield seen
    finally:
        seen.closing.set()
        http.shutdown()
        http.server_close()
        thread.join()


def send(handler: Any, status: int, body: str) -> None:
    data = body.encode()
    handler.send_response(status)
    handler.send_header("Content-Length", str(len(data)))
    handler.end_headers()
    handler.wfile.write(data)


def say(handler: Any, text: str | None) -> None:
    send(handler, 200, json.dumps({"choices": [{"message": {"role": "assistant", "content": text}}]}))


def truth(seen: Seen, handler: Any, body: dict) -> None:
    say(handler, "1" if "right" in body["messages"][0]["content"] else "0")


def ask_llm(seen: Seen, texts: list[str], **options: Any) -> tuple[list[float | None], dict[str, int]]:
    settings = {"model": "m", "url": seen.url, "timeout": 30.0, "retries": 1} | options
    return judge(build_judge({"llm": settings}), [rollout(t) for t in texts], ["seven"] * len(texts))


def test_an_endpoint_judges_and_equal_requests_are_asked_once():
    with server(truth) as seen:
        fn = build_judge({"llm": {"model": "m", "url": seen.url + "/chat/completions/"}})
        rollouts = [rollout(t) for t in ("right", "wrong", "right", "")]
        for _ in range(2):
            assert judge(fn, rollouts, ["seven"] * 4) == ([1.0, 0.0, 1.0, 0.0], {})
    assert len(seen.bodies) == 2
    seen.bodies[0].pop("messages")
    assert seen.bodies[0] == {"model": "m", "temperature": 0, "max_tokens": 16}


def test_requests_run_side_by_side_up_to_the_limit():
    def slow(seen: Seen, handler: Any, body: dict) -> None:
        time.sleep(0.1)
        truth(seen, handler, body)

    with server(slow) as seen:
        rewards, failures = ask_llm(seen, [f"right {i}" for i in range(12)], concurrency=4)
    assert rewards == [1.0] * 12 and not failures and seen.most == 4


def test_an_endpoint_that_recovers_is_asked_again():
    def twice_broken(seen: Seen, handler: Any, body: dict) -> None:
        if len(seen.bodies) < 3:
            send(handler, 500 if len(seen.bodies) == 1 else 429, "busy")
        else:
            truth(seen, handler, body)

    with server(twice_broken) as seen:
        assert ask_llm(seen, ["right"], retries=2) == ([1.0], {})
    assert len(seen.bodies) == 3


def hang(seen: Seen, handler: Any, body: dict) -> None:
    seen.closing.wait(10)


def trickle(seen: Seen, handler: Any, body: dict) -> None:
    """Always sending, not done for long: limits on each read do not notice."""
    handler.send_response(200)
    handler.send_header("Content-Length", "100000")
    handler.end_headers()
    for _ in range(300):
        if not seen.closing.wait(0.05):
            handler.wfile.write(b" ")
            handler.wfile.flush()


def hang_up(seen: Seen, handler: Any, body: dict) -> None:
    handler.close_connection = True


def half(seen: Seen, handler: Any, body: dict) -> None:
    handler.send_response(200)
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    handler.wfile.write(b'{"choices": [')
    handler.close_connection = True


@pytest.mark.parametrize(
    ("behave", "reason", "attempts"),
    [
        (lambda seen, handler, body: send(handler, 503, "no"), "HTTP 503", 2),
        (lambda seen, handler, body: send(handler, 401, "no"), "HTTP 401", 1),
        (hang, "timed out", 2),
        (trickle, "timed out", 2),
        (hang_up, "no connection (RemoteProtocolError)", 2),
        (half, "no connection (RemoteProtocolError)", 2),
        (lambda seen, handler, body: send(handler, 200, "<html>"), "reply is not a chat completion", 1),
        (lambda seen, handler, body: send(handler, 200, '{"choices": []}'), "reply is not a chat completion", 1),
        (lambda seen, handler, body: send(handler, 200, "[1]"), "reply is not a chat completion", 1),
        (lambda seen, handler, body: say(handler, "I cannot tell"), "reply is neither 1 nor 0", 1),
        (lambda seen, handler, body: say(handler, None), "reply is neither 1 nor 0", 1),
    ],
)
def test_a_broken_endpoint_leaves_the_response_undecided_with_the_reason(behave: Any, reason: str, attempts: int):
    began = time.monotonic()
    with server(behave) as seen:
        assert ask_llm(seen, ["right"], timeout=1.0 if reason == "timed out" else 30.0) == ([None], {reason: 1})
    assert len(seen.bodies) == attempts and time.monotonic() - began < 25


def test_a_failure_is_not_remembered():
    def once_broken(seen: Seen, handler: Any, body: dict) -> None:
        say(handler, "hm" if len(seen.bodies) == 1 else "1")

    with server(once_broken) as seen:
        fn = build_judge({"llm": {"model": "m", "url": seen.url}})
        assert [judge(fn, [rollout("right")], ["x"])[0] for _ in range(3)] == [[None], [1.0], [1.0]]
    assert len(seen.bodies) == 2


def test_one_failure_does_not_spoil_its_neighbours():
    def picky(seen: Seen, handler: Any, body: dict) -> None:
        bad = "poison" in body["messages"][0]["content"]
        send(handler, 500, "no") if bad else truth(seen, handler, body)

    with server(picky) as seen:
        rewards, failures = ask_llm(seen, ["right", "poison", "wrong"], retries=0)
    assert rewards == [1.0, None, 0.0] and failures == {"HTTP 500": 1}


def test_a_dead_endpoint_is_given_up_for_the_step():
    began = time.monotonic()
    with server(hang) as seen:
        rewards, failures = ask_llm(seen, [f"r{i}" for i in range(50)], timeout=0.3, retries=1, concurrency=2)
    assert rewards == [None] * 50 and failures["endpoint is down"] >= 45 and sum(failures.values()) == 50
    assert time.monotonic() - began < 12  # 15 s when each is waited for


def test_nobody_listening_is_a_reason_not_a_crash():
    with server(truth) as seen:
        pass  # closed again
    rewards, failures = ask_llm(seen, ["right"], retries=0)
    assert rewards == [None] and failures == {"no connection (ConnectError)": 1}


def test_the_key_is_sent_and_never_shown(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]):
    monkeypatch.setenv("JUDGE_KEY", "sk-secret\n")
    with server(lambda seen, handler, body: send(handler, 401, "no")) as seen:
        result = ask_llm(seen, ["right"], api_key_env="JUDGE_KEY")
    assert seen.headers[0]["Authorization"] == "Bearer sk-secret"
    monkeypatch.setenv("JUDGE_KEY", "sk-sécret")
    with pytest.raises(ValueError, match="not a key") as caught:
        build_judge({"llm": {"model": "m", "api_key_env": "JUDGE_KEY"}})
    shown = f"{result}{caught.value}{''.join(capfd.readouterr())}"
    assert "secret" not in shown and "sécret" not in shown


def test_a_proxy_of_the_environment_does_not_stand_before_loopback(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    with server(truth) as seen:
        assert ask_llm(seen, ["right"]) == ([1.0], {})


def test_reasons_add_up_to_the_undecided():
    def moody(seen: Seen, handler: Any, body: dict) -> None:
        text = body["messages"][0]["content"]
        send(handler, 404, "") if "lost" in text else say(handler, "maybe" if "vague" in text else "1")

    with server(moody) as seen:
        rewards, failures = ask_llm(seen, ["lost 1", "lost 2", "vague", "clear", "lost 1"])
    assert Counter(failures) == {"HTTP 404": 3, "reply is neither 1 nor 0": 1} and rewards.count(None) == 4
