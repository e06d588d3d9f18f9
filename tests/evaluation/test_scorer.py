"""Text under another model, against that model's own loss and against values computed by hand."""

import json
import math
import shutil
import sys
from pathlib import Path

import pytest
import torch

from tests.evaluation.judges import CONTEXT, Letters, Uniform, random_llama, trained_llama, with_tokenizer
from tests.helpers.text import QUESTIONS, byte_level
from unmask.errors import UserError
from unmask.evaluation import judge as module
from unmask.evaluation.judge import Passage, Scored, Scorer

CPU = torch.device("cpu")
TEXT = QUESTIONS[1]


def encode(scorer: Scorer, text: str) -> list[int]:
    return scorer.tokenizer.encode(text, add_special_tokens=False)


@torch.no_grad()
def own_loss(scorer: Scorer, ids: list[int]) -> float:
    """transformers' mean NLL of the second token and all after it."""
    tokens = torch.tensor([ids])
    return scorer.model(input_ids=tokens, labels=tokens).loss.item()


def test_it_is_the_models_own_loss(scorer: Scorer) -> None:
    ids = [scorer.start, *encode(scorer, TEXT)]
    assert len(ids) < CONTEXT
    (found,) = scorer.score([Passage(TEXT)])
    assert found.tokens == len(ids) - 1
    assert found.nll / found.tokens == pytest.approx(own_loss(scorer, ids), rel=1e-5)  # its sum is in fp32
    assert found[2:] == (False, 0)


def test_by_hand() -> None:
    """Uniform over 8: 3 bits a token, the first too, as it follows the start."""
    first, second = Scorer(Uniform(), Letters(), "").score([Passage("abc"), Passage("d?", "ef")])
    assert first == Scored(pytest.approx(3 * math.log(8)), 3, False, 0)
    assert second == Scored(pytest.approx(2 * math.log(8)), 2, False, 1)


def test_without_a_start_the_first_token_is_not_scored() -> None:
    tokenizer = Letters()
    tokenizer.bos_token_id = None
    assert Scorer(Uniform(), tokenizer, "").start is None
    found = Scorer(Uniform(), tokenizer, "").score([Passage("abc"), Passage("a"), Passage(""), Passage("bc", "a")])
    assert [own.tokens for own in found] == [2, 0, 0, 2]
    assert [own.nll for own in found] == pytest.approx([2 * math.log(8), 0, 0, 2 * math.log(8)])


def test_texts_of_a_batch_do_not_see_each_other(scorer: Scorer, monkeypatch: pytest.MonkeyPatch) -> None:
    passages = [Passage(text) for text in ["", *QUESTIONS, "a", "ö"]]
    alone = [scorer.score([passage])[0] for passage in passages]
    for at_once in (1, 50, 4096):
        monkeypatch.setattr(module, "_TOKENS_AT_ONCE", at_once)
        for found, expected in zip(scorer.score(passages), alone, strict=True):
            assert found.nll == pytest.approx(expected.nll, rel=1e-5)
            assert found[1:] == expected[1:]


def test_given_text_is_the_context(scorer: Scorer) -> None:
    """The chain rule: NLL(given) + NLL(text | given) = NLL(given text)."""
    given, text = "Ann has 3 pens", " and buys 4"
    assert encode(scorer, given + text) == encode(scorer, given) + encode(scorer, text)
    head, tail, whole, other = scorer.score(
        [Passage(given), Passage(text, given), Passage(given + text), Passage(text)]
    )
    assert head.nll + tail.nll == pytest.approx(whole.nll, rel=1e-5)
    assert head.tokens + tail.tokens == whole.tokens
    assert tail.tokens == other.tokens
    assert tail.nll != pytest.approx(other.nll, rel=1e-2)


def test_a_token_over_the_border_counts_as_text(scorer: Scorer) -> None:
    given, text = "def sol", "ve():"
    ids = encode(scorer, given + text)
    shared = next(i for i, (a, b) in enumerate(zip(ids, [*encode(scorer, given), -1], strict=False)) if a != b)
    assert shared < len(encode(scorer, given))
    (found,) = scorer.score([Passage(text, given)])
    assert found.tokens == len(ids) - shared


def test_what_does_not_fit_the_context_is_left_out(scorer: Scorer) -> None:
    text = TEXT * 4
    ids = [scorer.start, *encode(scorer, text)]
    assert len(ids) > CONTEXT
    whole, beyond = scorer.score([Passage(text), Passage(" no", text)])
    assert (whole.tokens, whole.is_cut) == (CONTEXT - 1, True)
    assert whole.nll / whole.tokens == pytest.approx(own_loss(scorer, ids[:CONTEXT]), rel=1e-5)
    assert beyond == Scored(0.0, 0, True, 0)


def test_the_end_token_stands_for_a_missing_start(judge: Path, tmp_path: Path) -> None:
    """As GPT-2's texts begin; a start of the model's settings comes before it."""
    shutil.copytree(judge, tmp_path / "judge")
    with_tokenizer(tmp_path / "judge", byte_level(), {"eos_token": "<|endoftext|>"})
    found = Scorer.load(str(tmp_path / "judge"), CPU)
    assert found.start == found.tokenizer.eos_token_id
    config = json.loads((tmp_path / "judge" / "config.json").read_text())
    (tmp_path / "judge" / "config.json").write_text(json.dumps(config | {"bos_token_id": 5}))
    assert Scorer.load(str(tmp_path / "judge"), CPU).start == 5


def test_loading_draws_nothing(judge: Path) -> None:
    """A run with dropout is the same with and without it."""
    before = torch.get_rng_state()
    Scorer.load(str(judge), CPU)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_trained_model(tiny_llama: Path, tmp_path: Path) -> None:
    """It finds what it writes itself likely, and the same words in another order not."""
    scorer = Scorer.load(str(trained_llama(tmp_path / "llama", tiny_llama)), CPU)
    written = json.loads((tiny_llama / "reference_greedy.json").read_text())["greedy_ids"]
    text = scorer.tokenizer.decode(written[1:]).lstrip()
    assert [scorer.start, *encode(scorer, text)] == written
    own, mixed = scorer.score([Passage(text), Passage(" ".join(sorted(text.split())))])
    assert own.nll / own.tokens == pytest.approx(own_loss(scorer, written), rel=1e-5)
    assert own.nll / own.tokens < 1 < 2 < mixed.nll / mixed.tokens


# --- bad input -------------------------------------------------------------------------------------------------------


def without(name: str) -> object:
    return lambda folder: (folder / name).unlink()


def _less_weights(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    tensors.pop("model.layers.1.mlp.up_proj.weight")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def _bert(folder: Path) -> None:
    import transformers

    config = transformers.BertConfig(
        vocab_size=99, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        initializer_range=0.5,
    )  # fmt: skip
    transformers.BertLMHeadModel(config).save_pretrained(folder)


def _pickled(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save({}, folder / "pytorch_model.bin")


def _configured(**changed: object) -> object:
    def change(folder: Path) -> None:
        file = folder / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changed))

    return change


def _index(folder: Path) -> None:
    listed = {"weight_map": {"lm_head.weight": "../elsewhere/model.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(listed))


BAD = {
    "a pickle": (_pickled, "holds its weights as a pickle.*save them as safetensors"),
    "code to fetch": (_configured(attn_implementation="someone/kernel"), "config.json: attn_implementation="),
    "code to fetch for a part": (
        _configured(text_config={"_experts_implementation": "someone/kernel"}),
        "config.json: _experts_implementation=",
    ),
    "code of its own": (
        _configured(model_type="own", auto_map={"AutoModelForCausalLM": "own.Model", "AutoConfig": "own.Config"}),
        "cannot be read as a causal language model",
    ),
    "an adapter": (lambda folder: (folder / "adapter_config.json").write_text("{}"), "is an adapter"),
    "deep settings": (lambda folder: (folder / "config.json").write_text("[" * 99_999), ".*nested too deeply"),
    "no model": (without("config.json"), "is not a folder with a model .*nothing is downloaded here: fetch one first"),
    "no weights": (without("model.safetensors"), "cannot be read as a causal language model"),
    "damaged settings": (lambda folder: (folder / "config.json").write_text("{"), "cannot be read as a causal"),
    "damaged weights": (lambda folder: (folder / "model.safetensors").write_bytes(b"x" * 99), "cannot be read as a c"),
    "some weights": (_less_weights, r"lacks weights of a causal language model, such as model.layers.1.mlp.up_proj"),
    "no tokenizer": (without("tokenizer.json"), "holds no tokenizer that can be read .*; copy the model's tokenizer"),
    "sees what follows": (_bert, "is not a causal model"),
}


@pytest.mark.parametrize(("damage", "message"), BAD.values(), ids=BAD)
def test_bad_folders(damage: object, message: str, judge: Path, tmp_path: Path) -> None:
    folder = tmp_path / "judge"
    shutil.copytree(judge, folder)
    damage(folder)
    with pytest.raises(UserError, match=rf"--generative {folder}: {message}"):
        Scorer.load(str(folder), CPU, "--generative ")


def test_an_index_that_leaves_the_folder(judge: Path, tmp_path: Path) -> None:
    folder = tmp_path / "judge"
    shutil.copytree(judge, folder)
    _index(folder)
    with pytest.raises(UserError, match="which is no safetensors file beside it"):
        Scorer.load(str(folder), CPU)


def test_a_name_on_the_hub_is_not_fetched() -> None:
    with pytest.raises(UserError, match="openai-community/gpt2: is not a folder with a model"):
        Scorer.load("openai-community/gpt2", CPU)


def test_without_transformers(judge: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(UserError, match=r"to score text with it, pip install 'unmask\[hf\]'"):
        Scorer.load(str(judge), CPU)


def test_the_tokenizer_of_another_model(tmp_path: Path) -> None:
    larger = byte_level()
    larger.add_special_tokens(["<|new|>"])
    folder = with_tokenizer(random_llama(tmp_path / "llama"), larger, {"bos_token": "<|new|>"})
    with pytest.raises(UserError, match=r"its tokenizer has the id \d+, its model only \d+ rows of embeddings"):
        Scorer.load(str(folder), CPU).score([Passage("some text")])
