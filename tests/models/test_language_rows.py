"""Hidden states and gradients against their definitions, row by row."""

import numpy as np
import pytest
from datasets import Dataset
from small_language_model import write_language_model

from dq_multimodal import InputError
from dq_multimodal.adapters.text import TextAdapter, detect_layout
from dq_multimodal.models.language import (
    CUT,
    MAX_TOKENS,
    TEMPLATE,
    Gradients,
    HiddenStates,
    LanguageModel,
    LanguageRows,
    add_lora,
    find_language_model,
    lora_layers,
    make_signs,
    project,
    row_gradients,
    row_losses,
    split_row,
    warm_up,
)
from dq_multimodal.stages.embedding import embed_rows, open_embeddings

ROWS = [
    {"instruction": "Add the numbers", "input": "1 2", "output": "3"},
    {"instruction": "Say something long", "input": "", "output": "word " * 30},
    {"instruction": "Name a colour", "input": "", "output": "blue"},
    {"instruction": "Nothing", "input": "", "output": ""},
    {"instruction": "Spell cat", "input": "slowly", "output": "c a t"},
]


@pytest.fixture(scope="module")
def language_model(tmp_path_factory):
    return write_language_model(tmp_path_factory.mktemp("llama"))


def text_rows(rows=ROWS, columns=None):
    dataset = Dataset.from_list(rows)
    return dataset, TextAdapter(dataset, detect_layout(dataset.column_names, columns), "none")


def load_all(model, rows=ROWS):
    """The tokens of all rows, with the end of each."""
    tokens = LanguageRows(*text_rows(rows), model, ends_rows=True)
    return tokens.load(np.arange(len(rows)))[0]


def with_lora(folder, seed=0):
    """A model whose LoRA weights are all away from zero."""
    import torch

    model = LanguageModel(str(folder))
    add_lora(model, seed)
    generator = torch.Generator().manual_seed(seed)
    for layer in lora_layers(model.net):
        layer.weight.data = 0.1 * torch.randn(layer.weight.shape, generator=generator)
    return model


def test_the_response_of_every_shape():
    def split(row, columns=None):
        layout = detect_layout(list(row), columns)
        return split_row(layout, [row[name] for name in layout.columns])

    assert split(ROWS[0]) == ("Add the numbers\n\n1 2", "3")
    assert split(ROWS[3]) == ("Nothing", "")
    assert split({"prompt": "Q", "completion": "A"}) == ("Q", "A")
    assert split({"text": "all of it"}) == ("", "all of it")
    assert split({"q": "Why?", "a": None}, ("q", "a")) == ("Why?", "")
    roles = ["system", "user", "assistant", "user", "assistant", "user"]
    chat = [{"role": role, "content": str(k)} for k, role in enumerate(roles)]
    assert split({"messages": chat}) == ("0\n\n1\n\n2\n\n3", "4")
    assert split({"messages": chat[:2]}) == ("", "0\n\n1")
    turns = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}]
    assert split({"system": "Be kind.", "conversations": turns}) == ("Be kind.\n\nHi", "Ho")


def test_tokens_of_a_row(language_model):
    model = LanguageModel(str(language_model))
    for ends_rows in (False, True):
        rows = LanguageRows(*text_rows(), model, ends_rows=ends_rows)
        (ids, n_prompt), problems = rows.load(np.array([0, 3]))
        assert problems == {}
        prompt = TEMPLATE[0] + "Add the numbers\n\n1 2" + TEMPLATE[1]
        assert model.tokenizer.decode(ids[0]) == prompt + "3" + "</s>" * ends_rows
        assert model.tokenizer.decode(ids[0][n_prompt[0] :]) == "3" + "</s>" * ends_rows
        assert len(ids[1]) - n_prompt[1] == ends_rows


@pytest.mark.parametrize(
    ("n_prompt", "n_response", "kept"),
    [
        (100, 300, (100, 300)),
        (600, 20, (459, 20)),  # 512 - 20 - 33
        (20, 900, (20, 459)),
        (900, 900, (223, 256)),  # half each; the template counts as prompt
    ],
)
def test_long_rows_keep_some_of_both_parts(language_model, n_prompt, n_response, kept):
    """The template takes 33 tokens of a byte each: 17 before the prompt, 16 after it."""
    before, after = map(len, TEMPLATE)
    assert (before, after, MAX_TOKENS) == (17, 16, 512)
    row = {"prompt": "x" * n_prompt, "completion": "y" * n_response}
    rows = LanguageRows(*text_rows([row]), LanguageModel(str(language_model)))
    ((ids,), (start,)), problems = rows.load(np.array([0]))
    prompt = TEMPLATE[0] + "x" * kept[0] + TEMPLATE[1]
    assert rows.model.tokenizer.decode(ids) == prompt + "y" * kept[1]
    assert start == len(prompt)
    is_cut = kept != (n_prompt, n_response)
    assert problems == ({CUT: [0]} if is_cut else {})


def test_hidden_states_are_means_that_weigh_later_tokens_more(language_model, tmp_path):
    """Against the definition: one row at a time, one token after the other."""
    import torch

    model = LanguageModel(str(language_model))
    embed_rows(HiddenStates(*text_rows(), model), tmp_path, 3)
    got = open_embeddings(tmp_path)
    assert got.shape == (5, 32)
    assert got.dtype == np.float32
    for row in range(5):
        (ids, _), _ = LanguageRows(*text_rows(), model).load(np.array([row]))
        with torch.no_grad():
            out = model.net(torch.tensor(ids), output_hidden_states=True)
        total, weights = torch.zeros(32), 0
        for place, state in enumerate(out.hidden_states[-1][0], 1):
            total, weights = total + place * state, weights + place
        np.testing.assert_allclose(got[row], (total / weights).numpy(), rtol=2e-4, atol=2e-5)


def test_a_row_without_tokens_is_zeros(language_model):
    dataset, adapter = text_rows([{"text": ""}, {"text": "x"}])
    rows = HiddenStates(dataset, adapter, LanguageModel(str(language_model)))
    got = rows.embed(rows.load(np.array([0, 1]))[0]).embedding
    assert not got[0].any()
    assert got[1].any()
    assert not rows.embed(([[]], [0])).embedding.any()


def test_losses_are_means_over_the_response(language_model):
    import torch

    model = LanguageModel(str(language_model))
    batch = load_all(model)
    got = row_losses(model, batch)
    for row, (ids, start) in enumerate(zip(*batch, strict=True)):
        with torch.no_grad():
            log_p = model.net(torch.tensor([ids])).logits[0].log_softmax(-1)
        losses = [-log_p[at - 1, ids[at]].item() for at in range(start, len(ids))]
        assert got[row].item() == pytest.approx(sum(losses) / len(losses), rel=1e-4)
    assert row_losses(model, ([[5, 6]], [2])).item() == 0


def test_gradients_are_those_of_one_row_at_a_time(language_model):
    """Against autograd, which is given each row by itself."""
    import torch

    model = with_lora(language_model)
    batch = load_all(model)
    got = row_gradients(model, batch)
    weights = [layer.weight for layer in lora_layers(model.net)]
    n_linear = 2 * 7  # layers x (4 of attention, 3 of the perceptron)
    assert len(got) == len(weights) == 2 * n_linear
    for row in range(5):
        alone = [batch[0][row]], [batch[1][row]]
        wanted = torch.autograd.grad(row_losses(model, alone).sum(), weights)
        for ours, theirs in zip(got, wanted, strict=True):
            torch.testing.assert_close(ours[row], theirs.flatten(), rtol=1e-3, atol=1e-5)
    assert all(layer.weight.grad is None for layer in lora_layers(model.net))


def test_a_projection_is_a_product_with_signs():
    import torch

    signs = make_signs(70, 128, seed=3)
    assert signs.shape == (70, 16)
    matrix = np.unpackbits(signs, axis=1, bitorder="little").astype(np.float32) * 2 - 1
    rows = np.random.default_rng(0).standard_normal((4, 70)).astype(np.float32)
    got = project(torch.from_numpy(rows), torch.from_numpy(signs)).numpy()
    np.testing.assert_allclose(got, rows @ matrix, rtol=1e-4, atol=1e-4)


def test_signs_are_the_same_in_parts_and_on_every_machine(monkeypatch):
    whole = make_signs(1000, 64, seed=1)
    monkeypatch.setattr("dq_multimodal.models.language.SIGN_ROWS", 7)
    assert (make_signs(1000, 64, seed=1) == whole).all()
    assert (make_signs(1000, 64, seed=2) != whole).any()

    def mix(z):
        z = (z + 0x9E3779B97F4A7C15) % 2**64
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
        return z ^ (z >> 31)

    for weight in (0, 1, 999):
        word = mix((mix(1) + weight) % 2**64)
        assert whole[weight].tobytes() == word.to_bytes(8, "little")


def test_projections_keep_inner_products_on_average():
    """Mean over seeds of <Pa, Pb> / k is <a, b>, within its error."""
    import torch

    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((2, 200)).astype(np.float32)
    b += a
    found = []
    for seed in range(200):
        signs = torch.from_numpy(make_signs(200, 64, seed))
        both = project(torch.from_numpy(np.stack([a, b])), signs).numpy()
        found.append(both[0] @ both[1] / 64)
    error = np.std(found) / len(found) ** 0.5
    assert abs(np.mean(found) - a @ b) < 4 * error
    assert error < 0.05 * abs(a @ b)


def test_projected_gradients_have_length_1_and_keep_their_cosines(language_model, tmp_path):
    model = with_lora(language_model)
    gradients = row_gradients(model, load_all(model))
    full = np.concatenate([part.numpy() for part in gradients], axis=1)
    signs = make_signs(full.shape[1], 1024, seed=0)
    embed_rows(Gradients(*text_rows(), model, signs), tmp_path, 2)
    got = open_embeddings(tmp_path)
    assert got.shape == (5, 1024)
    np.testing.assert_allclose(np.linalg.norm(got, axis=1), 1, rtol=1e-5)
    full /= np.linalg.norm(full, axis=1, keepdims=True)
    np.testing.assert_allclose(got @ got.T, full @ full.T, atol=5 / 1024**0.5)


def test_warm_up_lowers_the_loss_and_is_read_again(language_model, tmp_path):
    rows = [{"prompt": f"Count to {k}", "completion": "one two three"} for k in range(80)]
    file = tmp_path / "lora.safetensors"
    states = []
    for attempt in range(3):
        model = LanguageModel(str(language_model))
        tokens = LanguageRows(*text_rows(rows), model, ends_rows=True)
        before = row_losses(model, tokens.load(np.arange(8))[0]).mean().item()
        if attempt == 2:
            file.unlink()  # and so it is trained anew
        warm_up(model, tokens, 0, file)
        after = row_losses(model, tokens.load(np.arange(8))[0]).mean().item()
        assert after < before - 0.01
        states.append([layer.weight.detach().numpy() for layer in lora_layers(model.net)])
    assert any(layer.any() for layer in states[0][1::2])  # those that begin as zeros
    for state in states[1:]:
        for one, other in zip(states[0], state, strict=True):
            np.testing.assert_array_equal(one, other)
    assert [path.name for path in tmp_path.iterdir()] == [file.name]


def test_a_model_that_cannot_be_had_is_one_line(tmp_path):
    with pytest.raises(InputError, match=r"give a folder or a \.gguf file as --target-model"):
        find_language_model("no/such")
    with pytest.raises(InputError, match=r"^cannot load the model [^\n]+$"):
        LanguageModel(str(tmp_path))
