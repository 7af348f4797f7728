"""Plumbing for a judge behind any OpenAI-compatible chat server: questions, retries, a rate limit, a cache of answers.

Of evaluate.py: `open_judges` and `ask_within_budget` are what it calls. Below them only rank 0 runs; what goes wrong
there is a JudgeError with a complete line, with which they end every rank.
"""

import hashlib
import http.client
import json
import math
import os
import queue
import random
import re
import threading
import time
import urllib.error
import urllib.request
from dataclasses import dataclass, field, replace
from pathlib import Path

from utils.data import load_function, short_names
from utils.launch import fail, from_rank0, print0
from utils.models import check_length, is_hub_id, load_classifier, load_tokenizer
from utils.tokens import set_terminator

FIRST_DELAY, LONGEST_DELAY, TRIAL_TIMEOUT, PROGRESS_EVERY = 1, 60, 15, 10  # seconds
MAX_FAILURES = 8  # questions in a row

# The criteria and the form of the answer are those of arXiv 2403.17031, the words are ours.
TEMPLATE = """\
You see a forum post and two summaries of it. Decide which one sums up the points that matter most in the post better, \
without details that are beside the point. What counts is accuracy, coverage and coherence.

Post:
{prompt}

Summary A:
{a}

Summary B:
{b}

FIRST compare both in a single sentence that says which one you prefer and for what reason. SECOND name your choice on \
a line of its own, as "A" or "B" and nothing else. Write in this form:
Comparison: <your sentence>
Preferred: <"A" or "B">
"""


class JudgeError(Exception):
    """One line for the user: which flag, what is wrong, what to do."""


@dataclass
class Server:
    url: str  # http://host:8000/v1
    model: str
    template: str = TEMPLATE
    options: dict = field(default_factory=lambda: {"temperature": 0, "max_tokens": 200})  # part of every request
    timeout: float = 60  # seconds without a byte from the server
    retries: int = 5
    requests_per_minute: float | None = None
    parallel: int = 8  # requests at once
    prices: tuple[float, float] | None = None  # dollars per million tokens, input and output
    cache: str = "runs/evaluate_cache"  # folder

    @property
    def endpoint(self):
        return self.url.rstrip("/").removesuffix("/chat/completions") + "/chat/completions"


def fill(template, prompt, a, b):
    """The question. Every place is filled once, so that a "{b}" within a text stays as it is."""
    texts = {"prompt": prompt, "a": a, "b": b}
    return re.sub(r"\{(prompt|a|b)\}", lambda place: texts[place[1]], template)


def parse_letter(reply):
    """The letter of the last line `Preferred: A`, or where there is none of a last line that is a letter; or None."""
    reply = (reply or "").strip()
    preferred = re.findall(r"^[^a-z\n]*preferred\b[^:\n]*:\W*(.*)", reply, re.IGNORECASE | re.MULTILINE)
    words = re.findall(r"[^\W_]+", preferred[-1] if preferred else reply.rpartition("\n")[2])
    if preferred and words and words[0].lower() in ("summary", "response"):
        words = words[1:]
    return words[0].upper() if words in (["A"], ["a"], ["B"], ["b"]) else None


def _digest(value):
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _cache_file(server):
    return Path(server.cache) / f"{_digest([server.endpoint, server.model, server.options])[:16]}.jsonl"


def _read_cache(server):
    """{digest of the question: reply}"""
    replies, file = {}, _cache_file(server)
    for line in file.read_bytes().split(b"\n") if file.is_file() else ():
        try:
            row = json.loads(line)
            replies[row["key"]] = row["reply"]
        except (ValueError, TypeError, KeyError):  # empty, cut off by a kill, or damaged
            pass
    return replies


def _append_to_cache(server, question, reply, usage):
    line = json.dumps({"key": _digest(question), "reply": reply, "usage": usage}) + "\n"
    try:
        Path(server.cache).mkdir(parents=True, exist_ok=True)
        with open(_cache_file(server), "a+b", buffering=0) as file:  # unbuffered: the line is one write
            file.seek(max(0, file.seek(0, os.SEEK_END) - 1))
            cut_off = file.read(1) not in (b"", b"\n")
            file.write(b"\n" * cut_off + line.encode())
    except OSError as error:
        raise JudgeError(f"--cache {server.cache}: cannot write there ({error.strerror})") from None


class _Pace:
    """Spaces the requests of all threads evenly. Setting `stop` ends every thread that waits."""

    def __init__(self, requests_per_minute):
        self.gap = 60 / requests_per_minute if requests_per_minute else 0
        self.free, self.lock, self.stop = 0.0, threading.Lock(), threading.Event()

    def wait(self, seconds):
        if self.stop.wait(max(0, seconds)):
            raise JudgeError("stopped")  # ends this thread, and nobody reads it

    def turn(self):
        with self.lock:
            start = max(time.monotonic(), self.free)
            self.free = start + self.gap
        self.wait(start - time.monotonic())


def _api_key():
    return "".join(os.environ.get("OPENAI_API_KEY", "").split())  # http.client's error on a newline shows the key


def _post(server, question):
    """One request. Returns (reply, usage)."""
    body = {"model": server.model, "messages": [{"role": "user", "content": question}], **server.options}
    request = urllib.request.Request(server.endpoint, json.dumps(body).encode(), {"Content-Type": "application/json"})
    if _api_key():
        request.add_unredirected_header("Authorization", f"Bearer {_api_key()}")  # for this host only
    with urllib.request.urlopen(request, timeout=server.timeout) as response:
        try:
            answer = json.load(response)
            reply = answer["choices"][0]["message"].get("content") or ""  # null: all its tokens went into reasoning
            usage = answer.get("usage")
            return reply.strip(), usage if isinstance(usage, dict) else {}
        except (ValueError, KeyError, IndexError, TypeError, AttributeError):
            raise ValueError("its answer is not a chat completion") from None


def _server_message(error):
    """The first line of what the server says about an HTTP error, without the key, which some repeat."""
    try:
        text = error.read().decode(errors="replace")
    except (OSError, http.client.HTTPException):
        text = ""
    found = re.search(r'"(?:message|detail|error)"\s*:\s*"((?:[^"\\]|\\[^n])*)', text)
    text = (found[1].replace('\\"', '"') if found else text).strip().partition("\n")[0] or str(error.reason)
    return text.replace(_api_key() or "\n", "***")[:200]


def _answer(server, flag, question, pace):
    """("answered", reply, usage), ("refused", message, {}) or ("unanswered", message, {}).

    Raises JudgeError where every other question would fare the same.
    """
    for attempt in range(server.retries + 1):
        delay = FIRST_DELAY * 2**attempt * random.SystemRandom().uniform(1, 2)
        pace.turn()
        try:
            return "answered", *_post(server, question)
        except urllib.error.HTTPError as error:
            code, problem = error.code, f"HTTP {error.code}: {_server_message(error)}"
            if code in (400, 413, 422):  # too long, a content filter
                return "refused", problem, {}
            if code < 500 and code not in (408, 429):
                remedy = {401: "Set OPENAI_API_KEY", 403: "Set OPENAI_API_KEY to a key that may use this model",
                          404: f"Check the model name {server.model!r} and the URL, which mostly ends in /v1"}
                raise JudgeError(f"{flag} {server.url}: {problem}. {remedy.get(code, 'Check the URL')}") from None
            if (seconds := error.headers.get("Retry-After", "")).isdecimal():
                delay = max(delay, int(seconds))
        except (OSError, http.client.HTTPException, ValueError) as error:
            reason = getattr(error, "reason", error)
            problem = getattr(reason, "strerror", None) or str(reason) or type(reason).__name__
        if attempt < server.retries:
            pace.wait(min(delay, LONGEST_DELAY))
    return "unanswered", problem, {}


def check(server, flag):
    """Ask one trial question, so that a wrong URL, key, model or option shows at once."""
    if not server.url.startswith(("http://", "https://")):
        raise JudgeError(f"{flag} {server.url}: not a URL. Write it as http://host:8000/v1")
    question = fill(server.template, "My cat hid for two days, and today I found her in the piano.",
                    "The cat was found in the piano.", "Someone plays the piano.")
    if _digest(question) in _read_cache(server):
        return
    trial = replace(server, retries=1, timeout=min(TRIAL_TIMEOUT, server.timeout))
    kind, text, usage = _answer(trial, flag, question, _Pace(None))
    if kind == "unanswered" and "timed out" in text and server.timeout > TRIAL_TIMEOUT:  # it may be loading its model
        print0(f"{'judge':<22}{server.model}: no answer yet, waiting up to --judge_timeout {server.timeout:g} s")
        kind, text, usage = _answer(replace(server, retries=0), flag, question, _Pace(None))
    if kind == "refused":
        raise JudgeError(f"{flag} {server.url}: {text}. If it names one of --judge_options "
                         f"{json.dumps(server.options)}, change that one: some models refuse temperature or max_tokens")
    if kind == "unanswered":
        remedy = (f", or raise --judge_timeout {server.timeout:g}" if "timed out" in text else
                  "" if "not a chat completion" in text else ", or start the server")
        raise JudgeError(f"{flag} {server.url}: no answer ({text}). Check the URL{remedy}")
    _append_to_cache(server, question, text, usage)
    if parse_letter(text) is None:
        print0(f"warning: {flag} {server.url}: the reply to a trial question names neither A nor B: {text[:80]!r}")


def estimate(server, questions):
    """What `ask` would send, roughly: 4 characters a token, and answers as long as the options allow."""
    known, distinct = _read_cache(server), set(questions)
    new = [question for question in distinct if _digest(question) not in known]
    limits = (server.options.get(name) for name in ("max_tokens", "max_completion_tokens"))
    longest = next((limit for limit in limits if limit and isinstance(limit, int)), 200)
    tokens = sum(math.ceil(len(question) / 4) for question in new), len(new) * longest
    return {"requests": len(new), "cached": len(distinct) - len(new), "input_tokens": tokens[0],
            "output_tokens": tokens[1],
            "cost": server.prices and (tokens[0] * server.prices[0] + tokens[1] * server.prices[1]) / 1e6}


def ask(server, flag, questions):
    """(replies, tally): the replies in the order of the questions, None where there is none.

    Equal questions are asked and counted once. tally: asked (answered now, refused and unanswered), cached, refused,
    unanswered; input_tokens and output_tokens that the server reports for the answers of this call; and message, what
    the first question without an answer met with, or None.
    """
    replies = _read_cache(server)
    new = [question for question in dict.fromkeys(questions) if _digest(question) not in replies]
    tally = {"asked": len(new), "cached": len(set(questions)) - len(new), "refused": 0, "unanswered": 0,
             "input_tokens": 0, "output_tokens": 0, "message": None}
    todo, done, pace = queue.SimpleQueue(), queue.SimpleQueue(), _Pace(server.requests_per_minute)
    for question in new + [None] * server.parallel:
        todo.put(question)

    def work():
        for question in iter(todo.get, None):
            try:
                done.put((question, _answer(server, flag, question, pace)))
            except Exception as error:
                return done.put((question, error))

    began = printed = time.monotonic()
    failures = 0
    try:
        for _ in range(server.parallel):
            threading.Thread(target=work, daemon=True).start()  # a pool's threads would outlive Ctrl-C
        for count in range(1, len(new) + 1):
            question, outcome = done.get()
            if isinstance(outcome, Exception):
                raise outcome
            kind, text, usage = outcome
            if kind == "answered":
                _append_to_cache(server, question, text, usage)
                replies[_digest(question)] = text
                for name, theirs in (("input_tokens", "prompt_tokens"), ("output_tokens", "completion_tokens")):
                    tally[name] += usage[theirs] if isinstance(usage.get(theirs), int) else 0
            else:
                tally[kind] += 1
                tally["message"] = tally["message"] or text
            failures = failures + 1 if kind == "unanswered" else 0
            if failures == MAX_FAILURES:
                raise JudgeError(f"{flag} {server.url}: {failures} questions in a row without an answer ({text}). "
                                 f"{len(replies):,} answers are kept in {server.cache}: give the same command again to "
                                 "go on")
            if (now := time.monotonic()) - printed >= PROGRESS_EVERY:
                printed, left = now, int((now - began) / count * (len(new) - count))
                print0(f"{'judge':<22}{server.model}: {count:,}/{len(new):,}  unanswered "
                       f"{tally['refused'] + tally['unanswered']}  left {left // 60}:{left % 60:02d}")
    finally:
        pace.stop.set()
    return [replies.get(_digest(question)) for question in questions], tally


def connect(url, args):
    """The Server of --judges URL and the --judge_ flags, after a trial question. Every rank must call it."""
    try:
        template = Path(args.judge_template).read_text(encoding="utf-8") if args.judge_template else TEMPLATE
        options = json.loads(args.judge_options)
    except (OSError, UnicodeDecodeError) as error:
        fail(f"--judge_template {args.judge_template}: cannot be read ({getattr(error, 'strerror', 'not UTF-8 text')})")
    except json.JSONDecodeError as error:
        fail(f"--judge_options {args.judge_options}: not JSON ({error.msg}). Write it as '{{\"temperature\": 0}}'")
    if not {"{a}", "{b}"} <= set(re.findall(r"\{\w+\}", template)):
        fail(f"--judge_template {args.judge_template}: needs the places {{a}} and {{b}}, and mostly {{prompt}}")
    if not isinstance(options, dict):
        fail(f"--judge_options {args.judge_options}: must be an object. Write it as '{{\"temperature\": 0}}'")
    if args.judge_prices and min(args.judge_prices) < 0:
        fail(f"--judge_prices {' '.join(map(str, args.judge_prices))}: must be at least 0")
    if args.judge_budget is not None and args.judge_prices is None:
        fail(f"--judge_budget {args.judge_budget}: give --judge_prices too, or there is no estimate to hold it against")
    server = Server(url, args.judge_model, template, options, args.judge_timeout,
                    requests_per_minute=args.judge_requests_per_minute, parallel=args.judge_parallel,
                    prices=args.judge_prices, cache=args.cache)

    def trial():  # on rank 0
        try:
            check(server, "--judges")
        except JudgeError as error:
            return str(error)

    wrong = from_rank0(trial)
    if wrong:
        fail(wrong)
    return server


def open_judges(args, prompts):
    """{name: (kind, judge)} of --judges, each one tried out on the first of the Prompts.

    kind and judge: "reward model" and (classifier, its tokenizer), "function" and the function, "server" and a Server.
    """
    judges = {}
    for name, spec in short_names(args.judges or ()).items():
        flag = f"--judges {spec}"
        is_server = spec.startswith(("http://", "https://"))
        name = args.judge_model if is_server else name
        if name in judges:
            fail(f"{flag}: there are two judges named {name}, and results go by the name. Give one of them")
        if is_server:
            judges[name] = "server", connect(spec, args)
        elif ":" in spec and not Path(spec).exists():
            judges[name] = "function", load_function(spec, "--judges", prompts)
        elif not Path(spec).exists() and not is_hub_id(spec):
            fail(f"{flag}: no such folder. Give a reward model's Hugging Face folder or Hub id, module:function, or "
                 "the URL of a server")
        else:
            tokenizer = load_tokenizer(spec, "--judges")
            model = load_classifier(spec, "--judges", tokenizer, args.bf16).eval()
            check_length(model, args.max_prompt_length + args.response_length + 1,
                         f"{flag}: --max_prompt_length + --response_length + EOS")
            set_terminator(model, spec, "--judges", tokenizer, prompts[0].text)
            judges[name] = "reward model", (model, tokenizer)
    return judges


def ask_within_budget(server, questions, budget):
    """{question: reply, or None where there is none}, after a word on what they may cost. On rank 0 alone."""
    plan = estimate(server, questions)
    cost = "" if plan["cost"] is None else f", roughly ${plan['cost']:,.2f} or less"
    print0(f"{'judge':<22}{server.model}: {plan['requests']:,} questions ({plan['cached']:,} more are in "
           f"{server.cache}), about {plan['input_tokens']:,} tokens and up to {plan['output_tokens']:,} of "
           f"replies{cost}")
    if budget is not None and plan["cost"] > budget:
        fail(f"--judge_budget {budget:g}: the questions to {server.model} may cost ${plan['cost']:,.2f}. Raise it, or "
             "ask less: --num_prompts, --pairs references, fewer --models. The samples are kept in --cache")
    try:
        replies, tally = ask(server, "--judges", questions)
    except JudgeError as error:
        fail(str(error))
    print0(f"{'judge':<22}{server.model}: {tally['asked']:,} asked, {tally['refused']} refused, {tally['unanswered']} "
           f"without an answer; {tally['input_tokens']:,} tokens and {tally['output_tokens']:,} of answers"
           + (f"; the first one refused or silent: {tally['message']}" if tally["message"] else ""))
    return dict(zip(questions, replies))
