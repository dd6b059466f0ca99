"""Policies, their bounded errors, bodies of HTTP requests, and names that no client text can make."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from typing import Any

import pytest

from mixquant_sglang import recipe
from mixquant_sglang.recipe import LayerRule, policy
from mixquant_sglang.recipe.policy import PolicyError, asks_bf16, body_asks_bf16, client_key, kv_name

NVFP4 = recipe.load("nvfp4")
BF16 = {"mixquant": {"prefill": "bf16"}}
JSON = "application/json"


def test_what_asks_for_bf16() -> None:
    assert asks_bf16(BF16, NVFP4) and asks_bf16({**BF16, "__req__": object(), "thinking_budget": 3}, NVFP4)
    assert not any(asks_bf16(custom, NVFP4) for custom in (None, {}, {"mixquanty": 1}))


@pytest.mark.parametrize(
    "value",
    [
        *(None, 3, True, "bf16", [], ["bf16"], {}, {"prefill": "fp8"}, {"prefill": None}, {"prefil": "bf16"}),
        *({"prefill": "bf16", "decode": "bf16"}, {"prefill": ["bf16"]}, {"Prefill": "bf16"}),
    ],
)
def test_a_wrong_policy(value: Any) -> None:
    with pytest.raises(PolicyError, match=r"allowed: \{'prefill': 'bf16'\}") as error:
        asks_bf16({"mixquant": value}, NVFP4)
    assert policy.show(value) in str(error.value)


@pytest.mark.parametrize("custom", [[], ["mixquant"], "mixquant", 3, True, [BF16]])
def test_custom_params_that_are_no_object(custom: Any) -> None:
    with pytest.raises(PolicyError, match=r"custom_params is .*; allowed: an object"):
        asks_bf16(custom, NVFP4)


def deep(levels: int) -> Any:
    value: Any = 1
    for _ in range(levels):
        value = [value]
    return value


@pytest.mark.parametrize(
    "value",
    [
        "y" * 200_000,
        "\n\x00" * 100_000,
        {"k" * 200_000: 1},
        ["z" * 90] * 9999,
        deep(900),
        {str(n): n for n in range(999)},
        10**4000,
    ],
)
def test_a_message_shows_a_bounded_part_of_a_clients_value(value: Any) -> None:
    for custom in ({"mixquant": value}, {"mixquant": {"prefill": value}}, value):
        if not isinstance(custom, dict) or "mixquant" in custom:
            with pytest.raises(PolicyError) as error:
                asks_bf16(custom, NVFP4)
            assert len(str(error.value)) < 80 + 120 and str(error.value).isprintable()


def test_bf16_prefill_needs_all_layers_to_decode_in_bf16() -> None:
    with pytest.raises(PolicyError, match="recipe fp8-compact has decode w8a16, so it has no BF16 path"):
        asks_bf16({"mixquant": {"prefill": "bf16"}}, recipe.load("fp8-compact"))
    everywhere = recipe.load("nvfp4-everywhere")
    with pytest.raises(PolicyError, match="recipe nvfp4-everywhere has decode nvfp4"):
        asks_bf16(BF16, everywhere)
    rules = (LayerRule("lm", "fp8", None, "r.yaml:3"), LayerRule("re:.*down", "nvfp4", "nvfp4", "r.yaml:4"))
    by_rule = replace(NVFP4, layers=rules)
    with pytest.raises(PolicyError, match=r"has decode nvfp4 for some layers \(r.yaml:4\)"):
        asks_bf16(BF16, by_rule)
    assert asks_bf16(BF16, replace(NVFP4, layers=(rules[0], LayerRule("x", None, "bf16", "r.yaml:4"))))
    assert not asks_bf16(None, by_rule)


# -- bodies ---


def post(body: Any, path: str = "/v1/responses", content_type: str = JSON) -> bool:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    return body_asks_bf16(data, content_type, path, NVFP4)


def test_bodies_that_ask_for_bf16() -> None:
    for body in (
        {"input": "hi", "custom_params": BF16},
        {"text": "hi", "sampling_params": {"custom_params": BF16}},
        {"prompt": "hi", "options": {"custom_params": BF16}},
        {"instances": [{"text": "hi"}], "parameters": {"sampling_params": {"custom_params": BF16}}},
    ):
        assert post(body)
        assert post(json.dumps(body).encode("utf-16"))  # json.loads, and so Starlette, takes it
        assert post(json.dumps(body).replace("custom_params", "\\u0063ustom_params").encode())
    assert post({"custom_params": BF16}, content_type="")
    # JSON to FastAPI, whatever else is in its name
    assert post({"custom_params": BF16}, "/generate", "application/vnd.platform+json")


def test_a_body_as_deep_as_sglang_reads_it() -> None:
    deep = b"[" * 1000 + b"]" * 1000
    with pytest.raises(RecursionError):
        json.loads(deep)
    assert post(b'{"tools": %b, "custom_params": %b}' % (deep, json.dumps(BF16).encode()))
    with pytest.raises(PolicyError):
        post(b'{"tools": %b, "custom_params": {"mixquant": 1}}' % deep)


def test_bodies_that_do_not() -> None:
    for body in (
        {},
        {"input": "custom_params mixquant"},
        [BF16],
        "mixquant",
        {"custom_params": None},
        b"",
        b"{mixquant",
    ):
        assert not post(body)
    schema = {"tools": [{"parameters": {"properties": {"mixquant": {"type": "string"}}}}]}
    assert not post(schema) and not post(b"[" * 100_000 + b"mixquant")
    # /generate itself carries one policy a prompt
    assert not post({"text": ["a", "b"], "sampling_params": [{"custom_params": BF16}, {}]}, "/generate")


@pytest.mark.parametrize(
    "body",
    [
        {"custom_params": {"mixquant": {"prefill": "nonsense"}}},
        {"custom_params": {"mixquant": None}},
        {"custom_params": [BF16]},
        {"custom_params": "mixquant"},
        {"custom_params": 7},
        {"sampling_params": {"custom_params": {"mixquant": 1}}},
        {"sampling_params": [{"custom_params": BF16}, {"custom_params": {"mixquant": 1}}]},
        {"sampling_params": [{"custom_params": BF16}]},
        {"options": {"custom_params": {"mixquant": 1}}},
        {"parameters": {"sampling_params": {"custom_params": {"mixquant": 1}}}},
        {"mixquant": {"prefill": "bf16"}},
        {"sampling_params": BF16},
        {"extra_body": BF16},
        {"extra_body": {"custom_params": BF16}},
        {"instances": [{"text": "hi", "custom_params": BF16}]},
    ],
)
def test_bodies_that_are_refused(body: dict[str, Any]) -> None:
    with pytest.raises(PolicyError):
        post(body)
    with pytest.raises(PolicyError):
        post(json.dumps(body).encode("utf-16"))


OWN = {"prefill": "bf16"}
MISSPELT: list[dict[str, Any]] = [
    *({name: OWN} for name in ("Mixquant", "MIXQUANT", "mix_quant", "mix-quant", "MixQuant", " mixquant")),
    *({"prefill": "bf16"}, {"prefill": "BF16"}, {"Prefill": "bf16"}, {"prefill": "fp8"}, {**BF16, "mix_quant": OWN}),
]


@pytest.mark.parametrize("custom", MISSPELT)
def test_a_misspelt_policy_is_refused_wherever_custom_params_are_looked_at(custom: dict[str, Any]) -> None:
    with pytest.raises(PolicyError, match=r'^custom_params\..* is not looked at; give custom_params \{"mixquant"'):
        asks_bf16(custom, NVFP4)
    own = {"custom_params": custom}
    for body in (own, {"options": own}, {"sampling_params": own}, {"parameters": own}):
        for path in ("/generate", "/v1/responses"):
            with pytest.raises(PolicyError):
                post(body, path)
    with pytest.raises(PolicyError):
        post({"sampling_params": [{"custom_params": custom}]}, "/generate")


@pytest.mark.parametrize(
    ("body", "where"),
    [
        *(({name: BF16}, name) for name in ("custom_param", "customParams", "custom_parameters", "Custom_Params")),
        ({"custom-params": BF16}, "'custom-params'"),
        ({"custom_param": OWN}, "custom_param"),
        ({"customParams": {"Mix-Quant": OWN}}, "customParams"),
        ({"Mixquant": OWN}, "Mixquant"),
        ({"metadata": {"custom_params": BF16}}, "metadata.custom_params"),
        ({"metadata": {"custom_params": OWN}}, "metadata.custom_params"),
        ({"metadata": {"mixquant": OWN}}, "metadata.mixquant"),
        ({"chat_template_kwargs": {"custom_params": BF16}}, "chat_template_kwargs.custom_params"),
        ({"sampling_params": {"custom_param": BF16}}, "sampling_params.custom_param"),
        ({"extra_body": {"custom_params": {"mix_quant": OWN}}}, "extra_body.custom_params"),
        ({"options": {"MixQuant": 1}}, "options.MixQuant"),
        ({"sampling_params": [{"custom_param": BF16}]}, "sampling_params[].custom_param"),
        ({"sampling_params": [{"custom_params": {"x": 1}}, {"Mixquant": OWN}]}, "sampling_params[].Mixquant"),
        ({"messages": [{"role": "user", "content": "hi", "custom_params": BF16}]}, "messages[].custom_params"),
        ({"parameters": {"metadata": {"custom_params": BF16}}}, "metadata.custom_params"),
        ({"x" * 99: {"custom_params": BF16}}, "'xxx"),
    ],
)
def test_a_misplaced_policy_is_refused_with_its_place(body: dict[str, Any], where: str) -> None:
    with pytest.raises(PolicyError, match=r"is not looked at; give custom_params\.mixquant at the top") as error:
        post({"prompt": "hi", **body})
    assert str(error.value).startswith(where) and len(str(error.value)) < 300


@pytest.mark.parametrize(
    "body",
    [
        {"custom_params": {"thinking_budget": 3, "prefill": True}},
        {"custom_params": {"prefill": "Sure, here is"}},
        {"custom_params": {"prefill": {"tokens": 3}, "quantity": 2, "mixquant_prompt": 3}},
        {"custom_param": {"thinking_budget": 3}},
        {"custom_params": {"quant": {"mixquant": OWN}}},
        {"metadata": {"custom_params": {"thinking_budget": 3}}},
        {"metadata": {"mixquant": "the run of Tuesday"}},
        {"metadata": {"prefill": "bf16", "custom": 1}},
        {"tools": [{"type": "function", "function": {"name": "f", "parameters": {"properties": {"mixquant": OWN}}}}]},
        {"format": {"type": "object", "properties": {"custom_params": {"properties": {"mixquant": OWN}}}}},
        {"messages": [{"role": "user", "content": '{"custom_params": {"mixquant": {"prefill": "bf16"}}}'}]},
    ],
)
def test_what_is_of_others_is_left_alone(body: dict[str, Any]) -> None:
    assert not post({"prompt": "a customer's mixquant", **body})


def test_bodies_that_hold_a_key_are_parsed() -> None:
    for key in ("mixquant", "MIXQUANT", "Mix-Quant", "mix_quant", "custom_params", "customParams", "CUSTOM_PARAM"):
        assert policy.concerns(json.dumps({key: 1}).encode()), key
    assert policy.concerns(b'{"\\u006dixquant": 1}') and policy.concerns("mixquant".encode("utf-16"))
    assert not policy.concerns(json.dumps({"prompt": "Cecil quit; [1, 2, 3]", "max_tokens": 3}).encode())


@pytest.mark.parametrize("path", ["/api/generate", "/v1/classify", "/v1/completions"])
def test_a_list_of_policies_where_sglang_reads_none(path: str) -> None:
    with pytest.raises(PolicyError, match="belongs to /generate"):
        post({"prompt": "hi", "sampling_params": [{"custom_params": BF16}]}, path)


def test_a_form_has_no_policy() -> None:
    part = b'--b\r\nContent-Disposition: form-data; name="custom_params"\r\n\r\n{"mixquant": 1}\r\n--b--'
    with pytest.raises(PolicyError, match="a form has no"):
        post(part, "/v1/audio/transcriptions", "multipart/form-data; boundary=b")
    with pytest.raises(PolicyError, match="a form has no"):
        post(b"a=1&custom_params=mixquant", "/v1/audio/transcriptions", "application/x-www-form-urlencoded")
    assert not post(part.replace(b"mixquant", b"other"), "/v1/audio/transcriptions", "multipart/form-data; boundary=b")


# -- names ---


def client_texts() -> list[str | None]:
    rng = random.Random(0)
    texts: set[str | None] = {None, "", "|", "|mixquant=bf16", "mixquant", "mixquant:", "bf16", "|mixquant:bf16"}
    names = [kv_name(f, None) for f in FINGERPRINTS]
    texts |= {*names, *(f"{name}|" for name in names), *(f"|{name}" for name in names), *(f"{n}|{n}" for n in names)}
    texts |= {name[:n] for name in names for n in range(len(name))} | {name[n:] for name in names for n in range(9)}
    alphabet = ["|", ":", "=", "mixquant", "bf16", "0", "f", "é", "\x00", "\n", *FINGERPRINTS]
    for _ in range(2000):
        texts.add("".join(rng.choice(alphabet) for _ in range(rng.randrange(6))))
    return sorted(texts, key=repr)


FINGERPRINTS = ("bf16", "bf16bf16bf16bf16", "0123456789abcdef", "0" * 16)


def test_no_client_text_makes_the_name_of_another_fingerprint() -> None:
    """Injective: 4 fingerprints by 2000 texts have as many names; and what is added behind changes nothing."""
    texts = client_texts()
    names = {(fingerprint, text): kv_name(fingerprint, text) for fingerprint in FINGERPRINTS for text in texts}
    assert len(texts) > 1000 and len({*names.values()}) == len(names)
    for (fingerprint, text), name in names.items():
        assert client_key(name) == text
        for tail in ("|elastic_ep_size=8", "0a1b" * 8):  # what SGLang appends, to no key as to any
            longer = name + tail
            assert not any(longer == other for (f, _), other in names.items() if f != fingerprint)


def test_a_key_without_our_name_is_the_clients() -> None:
    for key in (None, "", "mine", "mixquant", "mixquant:bf1", "mixquant:bf16x", "mixquant:ABCDEF0123456789"):
        assert client_key(key) == key


def test_the_bytes_that_are_looked_for_first_are_of_what_is_looked_for() -> None:
    assert all(first.lower()[0] in part for first, part in policy._CONCERNS)
    ids = json.dumps({"input_ids": [*range(8192)], "sampling_params": {"temperature": 0, "max_new_tokens": 8}}).encode()
    found = [byte for first, _ in policy._CONCERNS for byte in first if byte in ids]
    assert not found, "no body of token ids is searched for words"
