"""utils/judge.py against a scripted server: every answer counts once, none is paid for twice, no fault is silent."""

import http.server
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import pytest
from conftest import ROOT

from utils import judge
from utils.judge import JudgeError, Server, ask, check, estimate, fill, parse_letter

KEY = "sk-secret-123"
UNUSED = {"refused": 0, "unanswered": 0, "input_tokens": 0, "output_tokens": 0, "message": None}


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(judge, "FIRST_DELAY", 0.001)
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


@pytest.fixture
def serve(tmp_path):
    """serve(script, **fields) -> (Server, requests so far). script(question, number of the request) returns a reply, or
    (status, body, headers)."""
    running = []

    def start(script, **fields):
        requests, lock = [], threading.Lock()

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with lock:
                    requests.append(SimpleNamespace(
                        path=self.path, headers=self.headers, body=body, time=time.monotonic()))
                    number = len(requests)
                answer = script(body["messages"][0]["content"], number)
                status, body, headers = answer if isinstance(answer, tuple) else (200, completion(answer), {})
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write((body if isinstance(body, str) else json.dumps(body)).encode())

            def log_message(self, *_):
                pass

        class Quiet(http.server.ThreadingHTTPServer):
            request_queue_size = 64

            def handle_error(self, *_):  # a client that went away
                pass

        fake = Quiet(("127.0.0.1", 0), Handler)
        threading.Thread(target=fake.serve_forever, args=(0.01,), daemon=True).start()
        running.append(fake)
        fields = {"url": f"http://127.0.0.1:{fake.server_port}/v1", "model": "m", "cache": str(tmp_path / "cache"),
                  "timeout": 5, **fields}
        return Server(**fields), requests

    yield start
    for fake in running:
        fake.shutdown()
        fake.server_close()


def completion(reply):
    return {"choices": [{"message": {"content": reply}, "finish_reason": "stop"}],
            "usage": {"prompt_tokens": 7, "completion_tokens": 3}}


def error(status, message, headers={}):
    return status, {"error": {"message": message, "code": status}}, headers


def echo(question, number):
    return f"re {question}"


def closed_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def questions(count):
    return [f"question {i}" for i in range(count)]


def the_line(wrong):
    """The message of a JudgeError: one line, without the key."""
    line = str(wrong.value)
    assert "\n" not in line and KEY not in line
    return line


# ---- Texts ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reply, letter", [
    ("Comparison: both are short.\nPreferred: A", "A"),
    ("Comparison: A is longer.\nPreferred: B\n", "B"),
    ('Preferred: "A"', "A"), ("Preferred: 'b'", "B"), ("Preferred: “B”.", "B"), ("preferred: a", "A"),
    ("**Preferred:** B.", "B"), ("**Preferred: A**", "A"), ("Preferred: **B**", "B"), ("_Preferred: A_", "A"),
    ("Preferred: [A]", "A"), ("Preferred: (B).", "B"), ('Preferred: <"A">', "A"), ("- Preferred : B", "B"),
    ("2. Preferred: A", "A"), ("Preferred: Summary A", "A"), ("preferred: response b", "B"),
    ("Preferred summary: B", "B"), ("Preferred (A or B): A", "A"), ("Preferred:\n\nB", "B"),
    ("Preferred: A\nOn reflection:\nPreferred: B", "B"), ("Preferred: A\n\nI hope that this helps.", "A"),
    ("Preferred: A\r\n", "A"), ("  Preferred: B", "B"),
    ("B", "B"), ("Both are fine.\n\n(A)", "A"), ("It is the second.\n**B**.", "B"),
    ("Preferred: A or B", None), ("Preferred: A and B are equal", None), ("Preferred: A/B", None),
    ("Preferred: neither", None), ("Preferred: tie", None), ("Preferred: C", None), ("Preferred: Both", None),
    ("Preferred: not A", None), ("Preferred: A good summary of it is hard to write", None),
    ("Preferred: A\nPreferred: neither", None), ("Preferred: A\nno:\nPreferred:", None), ("Preferred:", None),
    ("Preferred: neither\nB", None), ("A good summary would name the cat.", None), ("A\nis better", None),
    ("B is better, A is longer.", None), ("I preferred: A", None), ("Summary A", None), ("", None), ("\n", None),
    (None, None), ("...", None), ("AB", None)])
def test_parse_letter(reply, letter):
    assert parse_letter(reply) == letter


def test_fill_puts_each_text_in_once_whatever_braces_it_holds():
    assert fill("{prompt}|{a}|{b}|{x}|{a}", "P {b}", "{prompt} {{a}} {0}", r"\1 {") == (
        r"P {b}|{prompt} {{a}} {0}|\1 {|{x}|{prompt} {{a}} {0}")


def test_default_template_asks_for_what_parse_letter_reads():
    question = fill(judge.TEMPLATE, "the post", "first", "second")
    assert re.search(r"the post.*Summary A:\nfirst.*Summary B:\nsecond", question, re.DOTALL)
    assert all(word in question for word in ("accuracy", "coverage", "coherence", "FIRST", "SECOND"))
    assert question.index("Comparison: ") < question.index('Preferred: <"A" or "B">')


# ---- Requests ---------------------------------------------------------------------------------------------


def test_request_has_model_question_and_options_and_the_key_in_its_header_only(serve, monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("OPENAI_API_KEY", f" {KEY}\n")
    server, requests = serve(echo, options={"temperature": 0.5, "seed": 3})
    assert ask(server, "--judges", ["why?"])[0] == ["re why?"]
    assert requests[0].body == {"model": "m", "messages": [{"role": "user", "content": "why?"}], "temperature": 0.5,
                                "seed": 3}
    assert requests[0].headers["Authorization"] == f"Bearer {KEY}"
    assert requests[0].headers["Content-Type"] == "application/json"
    assert KEY not in repr(server) + "".join(capsys.readouterr())
    assert all(KEY not in file.name + file.read_text() for file in (tmp_path / "cache").iterdir())
    monkeypatch.delenv("OPENAI_API_KEY")
    ask(server, "--judges", ["who?"])
    assert "Authorization" not in requests[1].headers


def test_default_options_are_greedy_and_short():
    assert Server("http://x/v1", "m").options == {"temperature": 0, "max_tokens": 200}


def test_key_does_not_follow_a_redirect(serve, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    seen = []

    class Other(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            seen.append(self.headers["Authorization"])
            self.send_error(404)

        def log_message(self, *_):
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Other) as other:
        thread = threading.Thread(target=other.handle_request)
        thread.start()
        server, _ = serve(lambda *_: (302, "", {"Location": f"http://127.0.0.1:{other.server_port}/"}), retries=0)
        with pytest.raises(JudgeError):
            ask(server, "--judges", ["q"])
        thread.join()
    assert seen == [None]


@pytest.mark.parametrize("ending", ["", "/", "/chat/completions", "/chat/completions/"])
def test_url_may_end_as_it_likes(serve, ending):
    server, requests = serve(echo)
    server.url += ending
    ask(server, "--judges", ["q"])
    assert requests[0].path == "/v1/chat/completions"


def test_replies_keep_the_order_of_questions_when_answers_overtake_each_other(serve):
    together = threading.Barrier(4)  # breaks, and so fails the test, unless four requests are under way at once

    def script(question, number):
        together.wait(5)
        time.sleep(0.02 * (number % 4))
        return echo(question, number)

    server, _ = serve(script, parallel=4)
    replies, tally = ask(server, "--judges", questions(12))
    assert replies == [f"re {question}" for question in questions(12)]
    assert tally == {**UNUSED, "asked": 12, "cached": 0, "input_tokens": 84, "output_tokens": 36}


def test_no_more_requests_at_once_than_parallel(serve):
    lock, now, most = threading.Lock(), [0], [0]

    def script(question, number):
        with lock:
            now[0] += 1
            most[0] = max(most[0], now[0])
        time.sleep(0.02)
        with lock:
            now[0] -= 1
        return "A"

    server, _ = serve(script, parallel=2)
    ask(server, "--judges", questions(10))
    assert most[0] == 2


def test_equal_questions_are_asked_once(serve):
    server, requests = serve(echo)
    replies, tally = ask(server, "--judges", ["q", "p", "q", "q"])
    assert replies == ["re q", "re p", "re q", "re q"]
    assert len(requests) == 2 and tally["asked"] == 2
    assert ask(server, "--judges", ["q", "q", "r"])[1] == {**UNUSED, "asked": 1, "cached": 1, "input_tokens": 7,
                                                           "output_tokens": 3}


def test_nothing_to_ask(serve):
    server, requests = serve(echo)
    assert ask(server, "--judges", []) == ([], {**UNUSED, "asked": 0, "cached": 0})
    assert not requests


def test_empty_content_is_an_answer_and_null_is_empty(serve):
    server, requests = serve(lambda question, number: None)
    for asked in (1, 0):
        replies, tally = ask(server, "--judges", ["q"])
        assert replies == [""] and tally["asked"] == asked and tally["unanswered"] == 0
    assert len(requests) == 1


@pytest.mark.parametrize("usage", [{}, {"usage": [1]}, {"usage": {"prompt_tokens": "7", "completion_tokens": None}}])
def test_usage_may_be_missing_or_odd(serve, usage):
    server, _ = serve(lambda *_: (200, {"choices": [{"message": {"content": "A"}}], **usage}, {}))
    replies, tally = ask(server, "--judges", ["q"])
    assert replies == ["A"] and tally["input_tokens"] == tally["output_tokens"] == 0


def test_a_text_with_half_a_surrogate_and_accents_is_asked_and_kept(serve):
    server, requests = serve(echo)
    for _ in range(2):
        assert ask(server, "--judges", ["né \ud83d"])[0] == ["re né \ud83d"]
    assert len(requests) == 1


# ---- Cache ------------------------------------------------------------------------------------------------


def test_second_call_asks_nothing(serve):
    server, requests = serve(echo)
    first, _ = ask(server, "--judges", questions(5))
    second, tally = ask(server, "--judges", questions(5)[::-1])
    assert second == first[::-1] and len(requests) == 5
    assert tally == {**UNUSED, "asked": 0, "cached": 5}


@pytest.mark.parametrize("change", [{"model": "other"}, {"options": {"temperature": 1}}, {"url": "elsewhere"}])
def test_another_model_option_or_url_asks_anew(serve, change):
    server, requests = serve(echo)
    ask(server, "--judges", ["q"])
    if "url" in change:
        change = {"url": server.url.replace("127.0.0.1", "localhost")}
    other = judge.replace(server, **change)
    assert ask(other, "--judges", ["q"])[1]["asked"] == 1
    assert ask(server, "--judges", ["q"])[1]["asked"] == 0


def test_another_template_asks_anew_and_other_ways_of_asking_do_not(serve):
    server, requests = serve(echo)
    ask(server, "--judges", [fill("one {prompt} {a} {b}", "p", "x", "y")])
    assert ask(server, "--judges", [fill("two {prompt} {a} {b}", "p", "x", "y")])[1]["asked"] == 1
    same = judge.replace(server, url=server.url + "/", timeout=1, retries=0, parallel=1, requests_per_minute=1e6,
                         options=dict(reversed(server.options.items())))
    assert ask(same, "--judges", [fill("one {prompt} {a} {b}", "p", "x", "y")])[1]["asked"] == 0


@pytest.mark.parametrize("keep", [-1, 20, 4])  # of the last line: all but its newline, a part
def test_cut_off_line_is_asked_again_and_spoils_no_other(serve, tmp_path, keep):
    server, requests = serve(echo, parallel=1)
    ask(server, "--judges", ["a", "b"])
    file, = (tmp_path / "cache").iterdir()
    first, last, _ = file.read_text().split("\n")
    file.write_text(f"{first}\n{last if keep < 0 else last[:keep]}")
    replies, tally = ask(server, "--judges", ["a", "b", "c"])
    assert replies == ["re a", "re b", "re c"]
    assert tally["asked"] == (1 if keep < 0 else 2)
    assert ask(server, "--judges", ["a", "b", "c"])[1]["asked"] == 0


def test_lines_that_are_no_answers_spoil_no_other(serve, tmp_path):
    server, _ = serve(echo)
    ask(server, "--judges", ["a"])
    file, = (tmp_path / "cache").iterdir()
    file.write_text('5\n{"x": 1}\n' + file.read_text() + "[]\n")
    assert ask(server, "--judges", ["a"])[1]["asked"] == 0


def test_each_answer_is_kept_as_it_comes(serve, tmp_path):
    seen = []

    def script(question, number):
        seen.append([len(file.read_text().splitlines()) for file in (tmp_path / "cache").glob("*")])
        return "A"

    server, _ = serve(script, parallel=1)
    ask(server, "--judges", questions(20))
    assert seen[0] == [] and seen[-1][0] > 9  # the main thread writes while the next requests are under way


def test_cache_that_cannot_be_written_names_its_flag(serve, tmp_path):
    (tmp_path / "cache").write_text("")
    server, _ = serve(echo)
    with pytest.raises(JudgeError) as wrong:
        ask(server, "--judges", ["q"])
    assert the_line(wrong) == f"--cache {server.cache}: cannot write there (File exists)"


# ---- Failures ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("failure", [
    error(429, "slow down"), error(408, "too slow"), error(500, "oops"), error(503, "busy"), (502, "<html>", {}),
    (200, "<html>", {}), (200, {"error": "upstream"}, {}), (200, {"choices": []}, {}), (200, [], {}), (200, "", {}),
    (200, {"choices": [{"message": {"content": ["part"]}}]}, {}), (200, "{", {"Content-Length": "100"})], ids=str)
def test_passing_failures_are_tried_again(serve, failure):
    server, requests = serve(lambda question, number: failure if number < 3 else "A")
    replies, tally = ask(server, "--judges", ["q"])
    assert replies == ["A"] and len(requests) == 3
    assert tally == {**UNUSED, "asked": 1, "cached": 0, "input_tokens": 7, "output_tokens": 3}


def test_a_timeout_is_tried_again(serve):
    release = threading.Event()
    server, requests = serve(lambda question, number: release.wait(5) and "" if number == 1 else "A", timeout=0.5)
    assert ask(server, "--judges", ["q"])[0] == ["A"]
    release.set()
    assert len(requests) > 1


def test_delays_grow_with_jitter_up_to_the_longest(serve, monkeypatch):
    waits = []
    monkeypatch.setattr(judge, "FIRST_DELAY", 1)
    monkeypatch.setattr(judge._Pace, "wait", lambda pace, seconds: waits.append(seconds))
    for _ in range(10):
        server, _ = serve(lambda *_: error(500, "oops"), retries=9)
        ask(server, "--judges", ["q"])
    waits = [seconds for seconds in waits if seconds > 0]
    assert len(waits) == 90  # none after the last try
    for i in range(9):
        tries = waits[i::9]
        assert all(min(60, 2**i) <= seconds <= min(60, 2 * 2**i) for seconds in tries)
        assert len(set(tries)) > 1 or i > 5


@pytest.mark.parametrize("header, at_least, at_most", [
    ("1", 1, 1.1), ("100000", 60, 60), ("Wed, 21 Oct 2026 07:28:00 GMT", 0, 0.1), ("-5", 0, 0.1), ("0", 0.001, 0.1)])
def test_retry_after_is_obeyed_within_limits(serve, monkeypatch, header, at_least, at_most):
    waits = []
    monkeypatch.setattr(judge._Pace, "wait", lambda pace, seconds: waits.append(seconds))
    server, _ = serve(lambda question, number: error(429, "slow", {"Retry-After": header}) if number == 1 else "A")
    assert ask(server, "--judges", ["q"])[0] == ["A"]
    assert at_least <= max(waits) <= at_most


def test_requests_per_minute_spaces_all_threads_and_retries(serve):
    server, requests = serve(lambda question, number: error(500, "oops") if number % 2 else "A", parallel=4,
                             requests_per_minute=1200, retries=9)
    began = time.monotonic()
    assert ask(server, "--judges", questions(4))[0] == ["A"] * 4
    times = sorted(request.time - began for request in requests)
    assert len(times) >= 8 and all(seconds >= 0.05 * i for i, seconds in enumerate(times))


@pytest.mark.parametrize("status", [400, 413, 422])
def test_refused_questions_are_counted_and_the_others_go_on(serve, status):
    server, requests = serve(lambda question, number: error(status, f"{question} is too long\nmore")
                             if question[-1] in "24" else "A", parallel=1)
    replies, tally = ask(server, "--judges", questions(5))
    assert replies == ["A", "A", None, "A", None] and len(requests) == 5
    assert (tally["refused"], tally["unanswered"]) == (2, 0)
    assert tally["message"] == f"HTTP {status}: question 2 is too long"
    assert ask(server, "--judges", questions(5))[1]["asked"] == 2  # not cached


def test_many_refusals_in_a_row_do_not_stop_the_others(serve):
    server, _ = serve(lambda *_: error(400, "no"))
    assert ask(server, "--judges", questions(20))[1]["refused"] == 20


@pytest.mark.parametrize("status, remedy", [
    (401, "Set OPENAI_API_KEY"), (403, "Set OPENAI_API_KEY"), (404, "Check the model name 'm' and the URL"),
    (405, "Check the URL")])
@pytest.mark.parametrize("call", [check, lambda server, flag: ask(server, flag, questions(50))], ids=["check", "ask"])
def test_what_no_question_can_pass_stops_at_once_without_the_key(serve, monkeypatch, call, status, remedy, tmp_path):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    server, requests = serve(lambda *_: error(status, f"bad key {KEY}, see\nour page " + "x" * 300), parallel=2)
    with pytest.raises(JudgeError) as wrong:
        call(server, "--judges")
    line = the_line(wrong)
    assert line.startswith(f"--judges {server.url}: HTTP {status}: bad key ***") and remedy in line and len(line) < 400
    assert len(requests) <= 2 and not (tmp_path / "cache").exists()


@pytest.mark.parametrize("body, message", [
    ({"error": {"message": "m1"}}, "m1"), ({"object": "error", "message": "m2"}, "m2"), ({"error": "m3"}, "m3"),
    ({"detail": "m4"}, "m4"), ({"error": {"code": 1, "message": 'no "x" here'}}, 'no "x" here'),
    ("plain\ntext", "plain"), ("", "Bad Request"), ("y" * 500, "y" * 200)],
    ids=["openai", "vllm", "ollama", "fastapi", "quotes", "plain", "none", "long"])
def test_message_of_the_server_whatever_its_form(serve, body, message):
    server, _ = serve(lambda *_: (400, body, {}))
    assert ask(server, "--judges", ["q"])[1]["message"] == f"HTTP 400: {message}"


def test_eight_failures_in_a_row_stop_and_the_same_command_goes_on(serve):
    broken = True

    def script(question, number):
        return error(503, "busy") if broken and int(question.split()[1]) >= 5 else echo(question, number)

    server, requests = serve(script, parallel=1, retries=1)
    with pytest.raises(JudgeError) as wrong:
        ask(server, "--judges", questions(40))
    assert the_line(wrong) == (
        f"--judges {server.url}: 8 questions in a row without an answer (HTTP 503: busy). 5 answers are kept in "
        f"{server.cache}: give the same command again to go on")
    time.sleep(0.3)
    assert len(requests) < 60  # of 75: some more may begin before the line is drawn
    broken = False
    replies, tally = ask(server, "--judges", questions(40))
    assert replies == [f"re {question}" for question in questions(40)]
    assert (tally["cached"], tally["asked"]) == (5, 35)


def test_failures_with_a_success_between_are_counted_and_not_cached(serve):
    server, requests = serve(lambda question, number: "A" if int(question.split()[1]) % 8 == 7 else error(500, "oops"),
                             parallel=1, retries=0)
    replies, tally = ask(server, "--judges", questions(24))
    assert replies.count("A") == 3 and tally["unanswered"] == 21 and tally["message"] == "HTTP 500: oops"
    assert ask(server, "--judges", questions(3))[1]["asked"] == 3


def test_what_is_no_completion_is_called_so(serve):
    server, _ = serve(lambda *_: (200, "<html>", {}), retries=0)
    assert ask(server, "--judges", ["q"])[1]["message"] == "its answer is not a chat completion"


def test_retries_end(serve):
    server, requests = serve(lambda *_: error(500, "oops"), retries=3)
    assert ask(server, "--judges", ["q"])[0] == [None] and len(requests) == 4


def test_a_bug_in_a_thread_is_not_a_hang(serve, monkeypatch):
    monkeypatch.setattr(judge, "_post", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        ask(serve(echo)[0], "--judges", ["q"])


def test_ctrl_c_ends_at_once(tmp_path):
    """In a process of its own, whose exit would wait for threads: requests under way, a backoff, queued questions."""
    with socket.create_server(("127.0.0.1", 0)) as silent:  # takes connections and never answers
        code = ("import signal\nfrom utils.judge import Server, ask\n"
                "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # `pytest &` starts without it
                f"server = Server('http://127.0.0.1:{silent.getsockname()[1]}/v1', 'm', cache={str(tmp_path)!r})\n"
                "ask(server, '--judges', [str(i) for i in range(1000)])")
        process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stderr=subprocess.PIPE, text=True,
                                   env={**os.environ, "no_proxy": "*"})
        silent.settimeout(60)
        connection = silent.accept()
        began = time.monotonic()
        process.send_signal(signal.SIGINT)
        process.wait(40)
        connection[0].close()
        assert time.monotonic() - began < 20  # a request may take 60
        assert "KeyboardInterrupt" in process.stderr.read()


def test_progress_lines_say_done_total_unanswered_and_time_left(serve, monkeypatch, capsys):
    monkeypatch.setattr(judge, "PROGRESS_EVERY", 0)
    server, _ = serve(lambda question, number: error(400, "no") if number == 1 else "A", parallel=1)
    ask(server, "--judges", questions(3))
    lines = capsys.readouterr().out.splitlines()
    assert [re.sub(r"\s+", " ", line) for line in lines] == [
        f"judge m: {i}/3 unanswered 1 left 0:00" for i in (1, 2, 3)]


def test_progress_lines_are_rare(serve, monkeypatch, capsys):
    monkeypatch.setattr(judge, "PROGRESS_EVERY", 0.1)
    server, _ = serve(lambda *_: time.sleep(0.01) or "A", parallel=1)
    began = time.monotonic()
    ask(server, "--judges", questions(25))
    assert 1 <= len(capsys.readouterr().out.splitlines()) <= (time.monotonic() - began) / 0.1


# ---- Beforehand -------------------------------------------------------------------------------------------


def test_check_asks_one_question_once(serve, capsys):
    server, requests = serve(lambda *_: "Comparison: A.\nPreferred: A", template="T {prompt} | {a} | {b}")
    check(server, "--judges")
    check(server, "--judges")
    assert len(requests) == 1 and capsys.readouterr().out == ""
    assert re.fullmatch(r"T .+ \| .+ \| .+", requests[0].body["messages"][0]["content"])
    assert requests[0].body["max_tokens"] == 200


def test_check_of_a_server_that_is_down(tmp_path, capsys):
    url = f"http://127.0.0.1:{closed_port()}/v1"
    began = time.monotonic()
    with pytest.raises(JudgeError) as wrong:
        check(Server(url, "m", cache=str(tmp_path / "cache")), "--judges")
    assert the_line(wrong) == f"--judges {url}: no answer (Connection refused). Check the URL, or start the server"
    assert time.monotonic() - began < 5 and not (tmp_path / "cache").exists() and capsys.readouterr().out == ""


@pytest.mark.parametrize("url", ["localhost:8000/v1", "file:///etc/passwd", ""])
def test_check_of_what_is_no_url(tmp_path, url):
    with pytest.raises(JudgeError) as wrong:
        check(Server(url, "m", cache=str(tmp_path)), "--judges")
    assert the_line(wrong) == f"--judges {url}: not a URL. Write it as http://host:8000/v1"


def test_check_of_a_slow_server_names_the_flag(serve, monkeypatch, capsys):
    release = threading.Event()
    server, requests = serve(lambda *_: release.wait(5) and "A", timeout=0.3)
    with pytest.raises(JudgeError) as wrong:
        check(server, "--judges")
    assert the_line(wrong) == (
        f"--judges {server.url}: no answer (timed out). Check the URL, or raise --judge_timeout 0.3")
    assert len(requests) == 2 and capsys.readouterr().out == ""
    release.set()


def test_check_says_soon_that_it_waits_and_a_higher_timeout_helps(serve, monkeypatch, capsys):
    monkeypatch.setattr(judge, "TRIAL_TIMEOUT", 0.1)
    release = threading.Event()
    server, requests = serve(lambda question, number: release.wait(0.4) or "A", timeout=5)
    check(server, "--judges")
    assert "no answer yet, waiting up to --judge_timeout 5 s" in capsys.readouterr().out
    assert len(requests) == 3


def test_check_shows_what_the_server_refuses_and_names_the_options(serve):
    server, requests = serve(lambda *_: error(400, "Use max_completion_tokens" + "!" * 300 + "\nsecond line"))
    with pytest.raises(JudgeError) as wrong:
        check(server, "--judges")
    line = the_line(wrong)
    assert line.startswith(f"--judges {server.url}: HTTP 400: Use max_completion_tokens!!!") and "second" not in line
    assert line.count("!") == 200 - len("Use max_completion_tokens")
    assert '--judge_options {"temperature": 0, "max_tokens": 200}' in line and len(requests) == 1


def test_check_warns_about_a_reply_without_a_letter(serve, capsys):
    server, _ = serve(lambda *_: "I cannot\nsay" + "." * 200)
    check(server, "--judges")
    out = capsys.readouterr().out
    assert out == (f"warning: --judges {server.url}: the reply to a trial question names neither A nor B: "
                   f"{('I cannot' + chr(10) + 'say' + '.' * 68)!r}\n")


def test_check_tries_twice(serve):
    server, requests = serve(lambda question, number: error(500, "oops") if number == 1 else "B")
    check(server, "--judges")
    assert len(requests) == 2
    server, requests = serve(lambda *_: error(500, "oops"))
    with pytest.raises(JudgeError, match="no answer .HTTP 500: oops."):
        check(server, "--judges")
    assert len(requests) == 2


def test_estimate_by_hand(serve):
    server, requests = serve(echo, prices=(2.0, 10.0))
    texts = ["x" * 8, "y" * 9, "y" * 9]  # 2 and 3 tokens
    assert estimate(server, texts) == {"requests": 2, "cached": 0, "input_tokens": 5, "output_tokens": 400,
                                       "cost": pytest.approx((5 * 2 + 400 * 10) / 1e6)}
    assert not requests
    ask(server, "--judges", texts[:1])
    assert estimate(server, texts) == {"requests": 1, "cached": 1, "input_tokens": 3, "output_tokens": 200,
                                       "cost": pytest.approx((3 * 2 + 200 * 10) / 1e6)}
    ask(server, "--judges", texts)
    assert estimate(server, texts) == {"requests": 0, "cached": 2, "input_tokens": 0, "output_tokens": 0, "cost": 0}


@pytest.mark.parametrize("options, tokens", [
    ({}, 200), ({"max_tokens": 30}, 30), ({"max_completion_tokens": 900, "temperature": 1}, 900),
    ({"max_tokens": "30"}, 200)])
def test_estimate_takes_the_longest_answer_from_the_options(options, tokens):
    found = estimate(Server("http://x/v1", "m", options=options, cache="nowhere"), ["q"])
    assert found["output_tokens"] == tokens and found["cost"] is None
