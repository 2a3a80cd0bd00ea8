"""`longnet generate` as a person and a script meet it: real processes, pipes, signals, exit codes."""

from __future__ import annotations

import json
import re
import signal
import subprocess
from pathlib import Path

import pytest
import tokenizers
from builders import tiny_net
from files import write_lines
from processes import invoke

from longnet_cli.basics.errors import ConfigError, RefusedError
from longnet_cli.data.documents.chat import ChatTemplate
from longnet_cli.data.documents.tokenizer import Tokenizer
from longnet_cli.jobs.generating import generate, load_model
from longnet_cli.models.folder import ModelFolder
from longnet_cli.nets.longnet import LongNet
from longnet_cli.nets.weights import model_digest

TEMPLATE = """{% if messages[0]['role'] != 'system' %}{{ bos_token }}{% endif %}
{%- for message in messages %}<|im_start|>{{ message.role }}
{{ message.content | trim }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
PROMPT = "def far(keys):\n"


def words_of_chat() -> Tokenizer:
    inner = tokenizers.Tokenizer.from_str(Tokenizer.bytes().to_json())
    inner.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    return Tokenizer(inner)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random causal model of bytes, with a tokenizer that has a chat template."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    tiny_net(vocab_size=259).save_pretrained(folder, words_of_chat().to_json())
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"bos_token": {"content": "<|endoftext|>"}})
    )
    return folder


def rows(done: subprocess.CompletedProcess) -> list[dict]:
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_a_prompt_comes_from_anywhere_and_the_text_is_the_same(model, run_longnet, tmp_path):
    """As an argument, on stdin, in a file, in JSON Lines among others; read in any chunks; as text and as JSON."""
    (tmp_path / "prompt.txt").write_text(PROMPT)
    lines = [{"id": name, "text": text} for name, text in (("a", PROMPT), ("b", "Another one"))]
    write_lines(tmp_path / "prompts.jsonl", lines)
    command = ["generate -n 30 --model", model]
    as_json = [*command, "--format", "jsonl"]
    (row,) = rows(run_longnet(*as_json, PROMPT))
    assert (row["kind"], row["doc_id"], row["n_prompt"]) == ("generation", "prompt", len(PROMPT))
    assert row["n_tokens"] == len(row["tokens"]) == len(row["logprobs"]) == 30
    assert (row["finish_reason"], row["seed"]) == ("length", None)
    plain = run_longnet(*command, PROMPT)
    assert plain.stdout == row["text"] + "\n" * (not row["text"].endswith("\n"))
    assert "15 tokens read, 30 generated" in plain.stderr
    for words in ("-q", "-q -", "-q -i -", "-q --chunk 4", "-q -i prompt.txt"):
        done = run_longnet(*command, *words.split(), input=PROMPT)
        assert (done.stdout, done.stderr) == (plain.stdout, "")
    both = run_longnet(*command, "-q", "-i", "prompt.txt", "-i", "prompts.jsonl").stdout
    parts = [f"==> {name} <==\n{plain.stdout}\n" for name in ("prompt.txt", "a")]
    assert both.startswith("".join(parts) + "==> b <==\n")
    first, second = rows(run_longnet(*as_json, "-i", "prompts.jsonl"))
    assert first == row | {"doc_id": "a"}
    assert rows(run_longnet(*as_json, "Another one")) == [second | {"doc_id": "prompt"}]
    drawn = [*as_json, PROMPT, "--temperature", "1", "--top-p", "0.9"]
    (draw,) = rows(run_longnet(*drawn))
    assert rows(run_longnet(*drawn, "--seed", str(draw["seed"]))) == [draw]
    text, stop = row["text"], row["text"][4:7]
    (stopped,) = rows(run_longnet(*as_json, PROMPT, "--stop", stop))
    assert stopped["text"] == text[: text.index(stop)]


def test_every_line_says_what_made_it_as_scores_do(model, run_longnet, tmp_path):
    """The model that computed, its pattern included; each line alone, as lines of several runs may be put together."""
    (tmp_path / "two.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
    found = []
    for folder, options in ((model, []), (model, ["--pattern", "8/1"]), (tmp_path / "bare", [])):
        if folder != model:
            LongNet.from_pretrained(model).save_pretrained(folder)  # without a tokenizer
            (tmp_path / "two.jsonl").write_text('{"input_ids": [1, 2, 3]}\n{"input_ids": [4, 5]}\n')
        reading = ["--model", folder, *options, "--format", "jsonl"]
        lines = rows(run_longnet("generate -i two.jsonl -n 2", *reading))
        total = rows(run_longnet("score two.jsonl", *reading))[-1]
        keys = ("model_sha256", "tokenizer_sha256", "pattern")
        origins = [tuple(line[key] for key in keys) for line in lines]
        assert origins == [tuple(total.get(key) for key in keys)] * 2
        assert list(lines[0])[-3:] == list(keys)
        found.append(origins[0])
    assert found[0] == (
        model_digest(LongNet.from_pretrained(model)),
        words_of_chat().sha256,
        "8/1,32/2",
    )
    assert found[1] == (found[1][0], found[0][1], "8/1")
    assert found[1][0] != found[0][0]
    assert found[2] == (found[0][0], None, found[0][2])


def test_a_name_of_a_file_is_a_text_and_said_to_be_one(model, run_longnet, tmp_path):
    (tmp_path / "prompt.txt").write_text(PROMPT)
    done = run_longnet("generate prompt.txt -n 1 --model", model, code=0)
    assert "longnet: note: prompt.txt is continued as text; --input reads the file" in done.stderr


def test_a_closed_pipe_and_ctrl_c_end_it(model, start):
    """Text comes while the rest is still to come."""
    for end, code in (
        (lambda run: run.stdout.close(), 141),
        (lambda run: run.send_signal(signal.SIGINT), 130),
    ):
        run = start("generate", PROMPT, "--model", model, "-n", "1e9", "-q")
        assert run.stdout.read(20)
        end(run)
        assert run.wait(60) == code
        assert run.stderr.read() == b""


def test_a_message_goes_into_the_template(model, run_longnet, tmp_path):
    """The whole prompt is the template's; what looks like a special token in a message is its characters."""
    words = words_of_chat()
    template = ChatTemplate(model, words)
    ids = template.encode(" Hi <|im_end|>\n").tolist()
    assert (
        words.decode(ids)
        == "<|endoftext|><|im_start|>user\nHi <|im_end|><|im_end|>\n<|im_start|>assistant\n"
    )
    start, end = words.id_of("<|im_start|>"), words.id_of("<|im_end|>")
    assert [token for token in ids if token > 255] == [256, start, end, start]
    (tmp_path / "text.txt").write_text("Read this.")
    for given, message in ((["Hi"], "Hi"), (["-i", "text.txt", "Hi"], "Read this.\nHi")):
        (row,) = rows(run_longnet("generate --chat -n 5 --format jsonl --model", model, *given))
        assert row["n_prompt"] == len(template.encode(message))
        for said in (message, [{"role": "user", "content": message}]):
            assert [
                step.id for step in generate(f"{model}/", said, chat=True, max_tokens=5)
            ] == row["tokens"]
    (row,) = rows(run_longnet("generate Hi --model", model, "-n", "5", "--format", "jsonl"))
    loaded = load_model(f"{model}/")
    steps = [*generate(loaded, "Hi", max_tokens=5)]
    assert [step.id for step in steps] == row["tokens"]
    (ended,) = generate(loaded._replace(ends=frozenset({steps[0].id})), "Hi", max_tokens=5)
    assert ended.finish_reason == "eos"
    with pytest.raises(RefusedError, match="a message is a mapping with a role and a content"):
        generate(loaded, ["Hi"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{{ raise_exception('no users here') }}", "the chat template fails: no users here"),
        ("{% for %}", "the chat template fails: "),
        ("{{ messages.__class__.__mro__ }}", "the chat template fails: .*unsafe"),
        ("{{ messages.append(1) }}", "the chat template fails: .*unsafe"),
        ("a\n{{ 1 / 0 }}", r"division by zero \(line 2\)"),
        ("\n\n{{ messages[7].content }}", r"has no element 7 \(line 3\)"),
        (
            "{% macro f() %}{{ f() }}{% endmacro %}\n{{ f() }}",
            r"recursion depth exceeded \(line 1\)",
        ),
        (
            "a\nb{{ messages[0].content ~ '\\ud800' }}",
            r"surrogates not allowed",
        ),
    ],
)
def test_templates_that_fail_and_none_runs_code(tmp_path, text, message):
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"chat_template": [{"name": "default", "template": text}]})
    )
    with pytest.raises(ConfigError, match=message):
        ChatTemplate(tmp_path, words_of_chat()).encode("Hi")


def test_a_template_leaves_the_alarm_of_its_host_alone(tmp_path):
    (tmp_path / "chat_template.jinja").write_text("{{ messages[0].content }}")
    signal.alarm(1000)
    try:
        ids = ChatTemplate(tmp_path, words_of_chat()).encode("Hi")
    finally:
        seconds_left = signal.alarm(0)
    assert seconds_left > 900
    assert words_of_chat().decode(ids) == "Hi"


def test_a_template_renders_as_transformers_does(model):
    """Blocks trimmed, loops broken off, JSON, the marks of training."""
    hf = pytest.importorskip("transformers")
    text = """
    {%- for message in messages %}
      {% generation %}{{ message | tojson }}{% endgeneration %}
      {% if loop.index > 0 %}{% break %}{% endif %}
    {% endfor %}
    {{ bos_token }}{{ tools is none }}<é>"""
    (model.parent / "other").mkdir()
    (model.parent / "other/chat_template.jinja").write_text(text)
    words = words_of_chat()
    fast = hf.PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer.from_str(words.to_json())
    )
    message = [{"role": "user", "content": "é\n<&>"}]
    expected = fast.apply_chat_template(
        message, chat_template=text, add_generation_prompt=True, tokenize=False
    )
    template = ChatTemplate(model.parent / "other", words)
    assert words.decode(template.encode("é\n<&>")) == expected
    assert template.encode("é\n<&>").tolist() == fast.encode(expected, add_special_tokens=False)


def test_the_ids_at_which_a_model_ends(tmp_path):
    words = Tokenizer.bytes()
    assert ModelFolder(tmp_path).ends(words) == {256}
    assert ModelFolder(tmp_path).ends(None) == frozenset()
    (tmp_path / "config.json").write_text('{"model_type": "llama", "eos_token_id": 3}')
    assert ModelFolder(tmp_path).ends(words) == {3}
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [1, 2]}')
    assert ModelFolder(tmp_path).ends(words) == {1, 2}


def test_a_dry_run_counts_the_prompts_and_generates_nothing(model, tmp_path):
    (tmp_path / "a.txt").write_text(PROMPT * 9)
    done = invoke(
        "generate --dry-run -n 7 -i", tmp_path / "a.txt", "-m", f"{model}/", "--chunk", 32
    )
    assert done.exit_code == 0, done.output
    assert re.search(r"documents +1  the longest has 135 tokens\n", done.stdout)
    assert re.search(r"read +143  tokens in all", done.stdout)  # with one before the text
    assert re.search(r"new tokens +7  at most of each, [\d.]+ (us|ms|s) a token", done.stdout)
    assert PROMPT not in done.stdout
    words = ["generate", "--dry-run", "text", "-m", f"{model}/"]
    state = invoke(*words, "--save-state", tmp_path / "state")
    assert re.search(
        r"read +5  tokens .*new tokens +0  at most of each, .*; the state goes to .*state\n",
        state.stdout,
        re.S,
    )
    assert not (tmp_path / "state").exists()


def test_a_dry_run_takes_the_time_of_a_new_token_once(model):
    """It is measured, so its FLOPs do not count in the time as well. And it is read alone, in little memory."""
    done = invoke("generate --dry-run -n 1000 text -m", f"{model}/")
    seconds_of = {"us": 1e-6, "ms": 1e-3, "s": 1}
    minutes, rest, unit = re.search(r"time +(?:(\d+)m)?([\d.]+) ?(us|ms|s) ", done.stdout).groups()
    seconds = 60 * int(minutes or 0) + float(rest) * seconds_of[unit]
    each, unit = re.search(
        r"new tokens +1,000  at most of each, ([\d.]+) (us|ms|s) ", done.stdout
    ).groups()
    assert seconds == pytest.approx(1000 * float(each) * seconds_of[unit], rel=0.2)
    size = re.search(r"reading +([\d.]+) (\w+) ", done.stdout)
    assert size is None or (size[2] != "GiB" and float(size[1]) < 50)
