"""``mixquant doctor --report`` gives nothing away: neither what was typed, nor what the environment and files hold."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mixquant_sglang.tools import report
from mixquant_sglang.tools.hidden import MASK, Hidden, is_secret

CPU = ["--device", "cpu", "--attention-backend", "torch_native"]
HEX = "9f86d081884c7d659a2feaa0c55ad015"

# name -> (launch words, environment, the text of a recipe file or None, what must not be in the report)
ATTACKS: dict[str, tuple[list[str], dict[str, str], str | None, list[str]]] = {
    "keys, hosts and addresses": (
        [
            *(*CPU, "--api-key", "4711471147", "--admin-api-key=8080424242", "--revision=zq-hunter2"),
            *("--otlp-traces-endpoint", "https://zqu:zqp@zqhost.example:443/x?token=zqt", "--host", "zqhost"),
            *("--dist-init-addr", "zq-node-7:5000", "--nnodes", "2", "--node-rank", "1", "--tp-size", "2"),
            "--served-model-name=zqname",
        ],
        {},
        None,
        ["4711", "8080", "hunter2", "zqu", "zqp", "zqhost", "zqt", "zq-node", "zqname"],
    ),
    "a key that is a word of ours": (
        [*CPU, "--api-key", "fp8", "--enable-single-batch-overlap"],
        {},
        None,
        ["--api-key fp8"],
    ),
    "a flag cut short, as argparse takes it": ([*CPU, "--admin-api=zqhunter"], {}, None, ["zqhunter"]),
    "no blank behind the flag": ([*CPU, "--api-keyzqhunter2"], {}, None, ["zqhunter2"]),
    "a key where a flag was expected": ([*CPU, "--api-key", "--zq-hunter2"], {}, None, ["hunter2"]),
    "a key as a word of its own": ([*CPU, "zq-hunter2", "zq/hunter"], {}, None, ["hunter"]),
    "a wrong word": ([*CPU, "--kv-cache-dtype", "zqhunter2"], {}, None, ["zqhunter2"]),
    "a word where a number was expected": ([*CPU, "--port", "zqhunter2"], {}, None, ["zqhunter2"]),
    "keys in JSON": (
        [*CPU, "--json-model-override-args", '{"zq": "zqhunter2", "num_hidden_layers": "zqhunter3"}'],
        {},
        None,
        ["zqhunter2", "zqhunter3"],
    ),
    "broken JSON": ([*CPU, "--json-model-override-args", '{"zqhunter2'], {}, None, ["zqhunter2"]),
    "a folder with blanks": (
        ["--model-path", "/srv/zq client/zq secret model", *CPU],
        {},
        None,
        ["client", "secret model", "zq"],
    ),
    "a folder beside": (["--model-path", "zqclient-model-v2", *CPU], {}, None, ["zqclient", "model-v2"]),
    "a name on the hub": (["--model-path", "zqcorp/zqmodel", *CPU], {}, None, ["zqcorp", "zqmodel"]),
    "a folder in the home folder": (["--model-path", "~/zqmodels/x", *CPU], {}, None, ["zqmodels"]),
    "assignments before the command": (
        ["HF_TOKEN=zqhunter2", "SGLANG_ZQ=zqhunter3", "python", "-m", "sglang.launch_server", *CPU],
        {},
        None,
        ["zqhunter"],
    ),
    "no launch command": (["zqtool", "--token=zqhunter2", "zqmodel"], {}, None, ["zqtool", "zqhunter2", "zqmodel"]),
    "a container's command": (
        ["docker", "run", "-e", "HF_TOKEN=zqhunter2", "zqregistry/zq", "python3", "-m", "sglang.launch_server", *CPU],
        {},
        None,
        ["zqhunter2", "zqregistry"],
    ),
    "the environment": (
        CPU,
        {
            **{
                "HF_TOKEN": "hf_zqhunter",
                "SGLANG_API_KEY": "31337",
                "MIXQUANT_PASSWORD": "on",
                "NCCL_SOCKET_IFNAME": "zqeth",
            },
            **{
                "SGLANG_CACHE_ROOT": "/zqcache",
                "SGLANG_zqhunter": "1",
                "NCCL_HOSTID": "4711471147",
                "SGLANG_X": "zqx y",
            },
        },
        None,
        ["zq", "31337", "PASSWORD=on", "4711471147"],
    ),
    "a key of the environment that was typed": (
        [*CPU, "--kv-cache-dtype", "zqhunter2x"],
        {"OPENAI_API_KEY": "zqhunter2x"},
        None,
        ["zqhunter2x"],
    ),
    "a recipe file that is another file": (
        [],
        {},
        f"HF_TOKEN: hf_zqhunter\npassword: zqhunter3\n{HEX}: 1\n",
        ["zqhunter", HEX, "RECIPE"],
    ),
    "a recipe file that is no YAML": ([], {}, "zqhost.example zqhunter2: [\n  zqhunter3", ["zq"]),
    "an unknown word in a recipe file": ([], {}, "version: 1\nprefill: zqhunter2\n", ["zqhunter2"]),
    "a rule of a recipe file": (
        [],
        {},
        "version: 1\nprefill: fp8\nlayers:\n  - {match: 're:.*zqclient.*q_proj', prefill: bf16}\n",
        ["zqclient"],
    ),
    "a recipe file in an assignment": (
        ["MIXQUANT_RECIPE=RECIPEFILE", "python", "-m", "sglang.launch_server", *CPU],
        {},
        None,
        ["zqhunter"],
    ),
    "a command in one word": (
        ["env MIXQUANT_RECIPE=RECIPEFILE sglang serve zqclient --config CONFIG --api-key 4711471147 " + " ".join(CPU)],
        {},
        None,
        ["zqhunter", "zqclient", "4711471147"],
    ),
    "SGLang's own file of arguments": ([*CPU, "--config", "CONFIG"], {}, None, ["zqhunter"]),
}
CONFIG = "api-key: zqhunter2\nkv-cache-dtype: zqhunter3\n"
OFFLINE = {**os.environ, "HF_HUB_OFFLINE": "1"}
SCRIPT = """
import json, os, sys
from mixquant_sglang.tools import report
for asked, launch, environment in json.loads(sys.argv[1]):
    with report._silence():
        made = report.made(asked, launch, os.environ | environment)
    print("MADE" + json.dumps(made), flush=True)
"""


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    folder = tmp_path_factory.mktemp("zqfolder")
    files = {"CONFIG": folder / "zqconfig.yaml", "RECIPEFILE": folder / "zqrecipe.yaml"}
    files["CONFIG"].write_text(CONFIG)
    files["RECIPEFILE"].write_text("version: 1\nprefill: zqhunter2\n")
    asked = []
    for number, (launch, environment, text, _) in enumerate(ATTACKS.values()):
        file = folder / f"zqRECIPE{number}.yaml"
        if text is not None:
            file.write_text(text)
        words = [re.sub("CONFIG|RECIPEFILE", lambda found: str(files[found.group()]), word) for word in launch]
        asked.append((str(file) if text is not None else None, words, environment))
    (folder / "ask.py").write_text(SCRIPT)
    command = [sys.executable, "-W", "ignore", str(folder / "ask.py"), json.dumps(asked)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=1500, cwd=folder, env=OFFLINE)
    made = [json.loads(line[4:])[0] for line in done.stdout.splitlines() if line.startswith("MADE")]
    assert len(made) == len(ATTACKS), done.stderr[-3000:]
    return dict(zip(ATTACKS, made, strict=True))


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", ATTACKS)
def test_nothing_of_it_is_in_the_report(name: str, reports: dict[str, list[str]]) -> None:
    text = "\n".join(reports[name])
    found = [secret for secret in [*ATTACKS[name][3], "zqfolder", "zqconfig"] if secret in text]
    assert found == [], text
    assert text.startswith("mixquant: ") and "\nsglang: 0." in text


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_report_still_says_what_is_wrong(reports: dict[str, list[str]]) -> None:
    def ends(name: str) -> list[str]:
        return [line for line in reports[name] if line.startswith(("ends: ", "recipe: a file"))]

    assert ends("keys, hosts and addresses") == []
    (line,) = ends("a key that is a word of ours")
    assert "does not go with --enable-single-batch-overlap: " in line and MASK not in line
    assert f"argument --kv-cache-dtype: invalid choice: '{MASK}'" in ends("a wrong word")[0]
    assert "argument --port: invalid int value" in ends("a word where a number was expected")[0]
    assert "unrecognized arguments" in ends("a key as a word of its own")[0]
    assert "is no launch command; allowed: " in ends("no launch command")[0]
    assert "refused: " in ends("an unknown word in a recipe file")[0]
    assert "must be a mapping" in ends("an unknown word in a recipe file")[0]
    assert "must be a mapping" in ends("a recipe file in an assignment")[0]
    assert {"flag: --device cpu", f"flag: --api-key {MASK}"} <= {*reports["a command in one word"]}
    lines = reports["a flag cut short, as argparse takes it"]
    assert f"flag: --admin-api-key {MASK}" in lines and "flag: --device cpu" in lines


def test_the_recipe_is_what_a_server_in_this_environment_has() -> None:
    def made(min_tokens: str) -> tuple[list[str], bool]:
        lines, healthy = report._recipe("fp8", min_tokens, Hidden())
        return [line for line in lines if line.startswith(("recipe: ", "fingerprint: "))], healthy

    (auto, one), healthy = made("")
    (number, other), _ = made("512")
    assert healthy and "min_tokens auto," in auto and "min_tokens 512," in number and one != other
    assert "refused: " in (said := made("many"))[0][0] and not said[1]


def test_what_is_shown_of_flags() -> None:
    known = report.flags_of_sglang()
    words = ["--model-path", "/a/b", "--tp=2", "--quantization", "mixquant", "--lora-paths", "x=/y", "--device", "cpu"]
    assert report.flags([*words, "--mem-fraction-static", "0.8", "--enable-metrics", "--zq=1", "2"], known) == [
        f"--model-path {MASK}",
        "--tp-size 2",
        "--quantization mixquant",
        f"--lora-paths {MASK}",
        "--device cpu",
        "--mem-fraction-static 0.8",
        "--enable-metrics",
        f"a flag that SGLang does not have: {MASK} {MASK} {MASK}",
    ]
    assert report.typed(["A=b", "python", *words], known) == ["A=b", "b", "python", "/a/b", "x=/y", "/y"]


@pytest.mark.parametrize("value", ["4711", "true", "none", "cpu", "mixquant", "fp8", "auto", "0.5", "hunter2"])
def test_a_flag_shows_only_what_sglang_lists_for_it_and_numbers_where_it_takes_them(value: str) -> None:
    """Of every flag that SGLang has, in both spellings."""
    known = report.flags_of_sglang()
    assert len(known) > 400
    shown = {
        flag for flag in known for form in ([flag, value], [f"{flag}={value}"]) if value in report.flags(form, known)[0]
    }
    shown = {flag for flag in shown if value not in flag}
    keys = ("key", "password", "token-", "host", "path", "addr", "url", "endpoint", "served", "revision", "dir", "json")
    numbers = {flag for flag in shown if known[flag].numbers}
    assert not [flag for flag in shown - numbers if value not in known[flag].words]
    assert not [flag for flag in shown - numbers if any(part in flag for part in keys)]
    assert not {"--api-key", "--admin-api-key", "--ssl-keyfile-password", "--host", "--served-model-name"} & shown


def test_variables_show_numbers_and_switches_but_no_keys() -> None:
    given = {
        "SGLANG_A": "1",
        "SGLANG_B": "true",
        "SGLANG_C": "x",
        "NCCL_DEBUG": "off",
        "PATH": "/x",
        "HF_HUB_OFFLINE": "1",
    }
    given |= {"MIXQUANT_RECIPE": "fp8", "SGLANG_SOME_KEY": "12", "TRITON_ACCESS_TOKEN": "12", "SGLANG_D": "12345678901"}
    assert report.variables(given) == [
        "environment: MIXQUANT_RECIPE=fp8",
        "environment: NCCL_DEBUG=off",
        "environment: SGLANG_A=1",
        "environment: SGLANG_B=true",
        f"environment: SGLANG_C={MASK}",
        f"environment: SGLANG_D={MASK}",
        f"environment: SGLANG_SOME_KEY={MASK}",
        f"environment: TRITON_ACCESS_TOKEN={MASK}",
    ]


@pytest.mark.parametrize(
    "name",
    [
        "HF_TOKEN",
        "OPENAI_API_KEY",
        "AWS_SECRET_ACCESS_KEY",
        "A_PASSWORD",
        "DB_PASS",
        "AUTHORIZATION",
        "a_token",
        "HFTOKEN",
    ],
)
def test_names_of_keys(name: str) -> None:
    assert is_secret(name)


@pytest.mark.parametrize("name", ["SGLANG_MAX_TOKENS", "NCCL_DEBUG", "MONKEYS", "SGLANG_PASSES", "TRITON_CACHE_DIR"])
def test_names_of_no_keys(name: str) -> None:
    assert not is_secret(name)


def test_forms_of_paths_addresses_and_keys() -> None:
    """What nobody typed here: from a config of a model, from SGLang, from the hub."""
    hidden = Hidden()
    for secret in (
        *(
            "/a/b.yaml",
            "~/x",
            "org/name",
            "C:\\Users\\me",
            "https://u:p@x.y/z?t=1",
            "s3://bucket/key",
            "me@host.example",
        ),
        *(
            "10.0.0.1",
            "fe80::1ff:fe23:4567:890a",
            "2001:db8::1",
            "hf_abcdefgh",
            "sk-abc123",
            "ghp_abcdefgh",
            "AKIAABCDEFGH",
        ),
        *("eyJhbGciOi.eyJzdWI", "aB3dE5gH7jK9mN1pQ3sT5", HEX),
    ):
        said = hidden.out_of(f"cannot use {secret} here: 12 of 34 layers")
        assert said == f"cannot use {MASK} here: 12 of 34 layers", secret
    plain = (
        "--enable-pdmux does not go with SGLANG_FLASHINFER_CUTEDSL_NVFP4_W4A16 on SM90 at 12:30: [4096, 12288] (0.5.17)"
    )
    assert hidden.out_of(plain) == plain
    plain = "the following arguments are required: --model-path/--model"
    assert hidden.out_of(plain) == plain
    hidden.add("--zq-hunter2")
    said = hidden.out_of("unrecognized arguments: --zq-hunter2/--x /--srv/--zq --a/b")
    assert said == f"unrecognized arguments: {MASK}"


def test_what_is_known_is_found_in_every_form() -> None:
    hidden = Hidden()
    hidden.add("it's a zq\tkey")
    hidden.add("zq" * 60)
    hidden.add("/srv/zq models/zqx-7B")
    for line in (
        "it's a zq\tkey",
        repr("it's a zq\tkey"),
        json.dumps("it's a zq\tkey"),
        "zq" * 38,
        "/srv/zq models",
        "zqx-7B",
    ):
        said = hidden.out_of(f"cannot read {line}...")
        assert "zq" not in said.lower() and said.startswith("cannot read "), said


def test_who_and_where() -> None:
    hidden = Hidden()
    given = {"USER": "zquser", "HOME": "/home/zquser", "HOSTNAME": "zqhost.corp.example", "A_TOKEN": "zqtoken"}
    hidden.add_environment(given)
    said = hidden.out_of("zquser on ZQhost (zqhost.corp.example, zqhost.other.example) with zqtoken")
    assert said.replace(MASK, "") == " on  () with "
    assert os.uname().nodename not in hidden.out_of(f"at {os.uname().nodename}:")


def test_what_sglang_says_meanwhile_is_no_part_of_it(capfd: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    def noisy(*_: object) -> tuple[list[str], bool]:
        import logging
        import warnings

        print("/zq/path")
        print("/zq/path", file=sys.stderr)
        warnings.warn("/zq/path", stacklevel=1)
        logging.getLogger("sglang").error("/zq/path")
        return ["a line"], True

    monkeypatch.setattr(report, "made", noisy)
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    assert report.run("auto", []) == 0
    assert capfd.readouterr() == ("a line\n", "")


def test_an_error_of_its_own_has_no_text(tmp_path: Path) -> None:
    script = "from mixquant_sglang.tools import report; report.made = lambda *_: {}['/zq/path']; report.run('auto', [])"
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.splitlines()[-1] == "mixquant: no report: KeyError; without --report it says more"
    assert "zq" not in done.stderr


def test_files_that_cannot_be_read_are_no_matter(tmp_path: Path) -> None:
    assert report._text_of(str(tmp_path)) == report._text_of("\0") == report._text_of(str(tmp_path / "none")) == ""
