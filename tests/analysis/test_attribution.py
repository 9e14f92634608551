"""Attribution against the same in float64 from the captured values, and the identities of the stacks."""

import numpy as np
import pytest

import irkit
from irkit import analysis, families
from irkit.errors import OptionError

TEXT = "hello there, tiny model"


@pytest.fixture(scope="module")
def trace(tiny: irkit.Session) -> irkit.Trace:
    """Of everything, in a batch of two."""
    names = ("embed", "result", "attn_out", "mlp_out", "resid_pre", "resid_mid", "resid_post", "z")
    scales = ("ln1.scale", "ln2.scale", "ln_final.scale")
    return tiny.trace([TEXT, TEXT[::-1]], names=(*names, *scales))


def direction(session: irkit.Session, token: int) -> np.ndarray:
    file = session.model.file
    weights = families.weights(file, session.model.config)
    norm, unembed = (families.read_weight(file, weights[name]) for name in ("ln_final", "unembed"))
    assert norm is not None
    assert unembed is not None
    return unembed[token].astype(np.float64) * norm


@pytest.mark.parametrize("position", [-1, 3])
def test_the_terms_sum_to_the_logit_difference(tiny: irkit.Session, position: int) -> None:
    logits = tiny.trace(TEXT, names=()).logits[0, position]
    one = analysis.logit_attribution(tiny, TEXT, "he", position=position)
    he = tiny.tokenize("he")[0]
    assert one.total == pytest.approx(logits[he], abs=1e-3)
    assert one.logit == pytest.approx(logits[he], abs=1e-3)
    both = analysis.logit_attribution(tiny, TEXT, he, 17, position=position)
    assert both.total == pytest.approx(logits[he] - logits[17], abs=1e-3)
    assert sum(both.components.values()) == pytest.approx(both.total)
    assert both.position == position % len(tiny.tokenize(TEXT))


def test_each_term(tiny: irkit.Session, trace: irkit.Trace) -> None:
    found = analysis.logit_attribution(tiny, trace.row(0), 5)
    towards = direction(tiny, 5) / trace.row(0)["ln_final.scale"][0, -1, 0]
    its = trace.row(0)
    assert found.embed == pytest.approx(its["embed"][0, -1] @ towards, abs=1e-5)
    np.testing.assert_allclose(found.attn, its["attn_out"][:, 0, -1] @ towards, atol=1e-5)
    np.testing.assert_allclose(found.heads, its["result"][:, 0, -1] @ towards, atol=1e-5)
    np.testing.assert_allclose(found.mlp, its["mlp_out"][:, 0, -1] @ towards, atol=1e-5)
    # The second layer has a bias, which is no head's; the first has none.
    file = tiny.model.file
    bias = families.read_weight(file, families.weights(file, tiny.model.config)["blocks"][1]["o_bias"])
    assert bias is not None
    np.testing.assert_allclose(found.attn_bias, [0, bias @ towards], atol=1e-5)
    # A head's share is that of its values through its part of the output matrix.
    matrix = families.read_weight(file, families.weights(file, tiny.model.config)["blocks"][0]["o"])
    assert matrix is not None
    by_head = np.einsum("hd,ohd,o->h", its["z", 0][0, -1], matrix.reshape(64, 4, 16), towards)
    np.testing.assert_allclose(found.heads[0], by_head, atol=1e-4)


def test_as_text_and_table(tiny: irkit.Session, trace: irkit.Trace) -> None:
    found = analysis.logit_attribution(tiny, trace.row(0), "he", "x")
    frame = found.to_frame()
    assert frame.attribution.sum() == pytest.approx(found.total)
    assert len(frame) == 1 + 2 * (4 + 1 + 1)
    assert float(frame[frame.component == "L1H2"].attribution.iloc[0]) == found.heads[1, 2]
    lines = repr(found).splitlines()
    assert lines[0].startswith("logit of 'he' minus that of 'x', after position ")
    largest = max(found.components, key=lambda name: abs(found.components[name]))
    assert lines[1].split()[-1] == largest
    shown = [float(line.split()[0]) for line in lines[1:]]
    assert sum(shown[:-1]) == pytest.approx(shown[-1], abs=0.01)


def test_accumulated_resid(trace: irkit.Trace) -> None:
    stack, labels = analysis.accumulated_resid(trace, return_labels=True)
    assert labels == ["0_pre", "1_pre", "final_post"]
    assert stack.shape == (3, *trace["embed"].shape)
    np.testing.assert_array_equal(stack[1], trace["resid_post", 0])
    np.testing.assert_array_equal(stack[2], trace["resid_post", 1])
    stack, labels = analysis.accumulated_resid(trace, 1, incl_mid=True, return_labels=True)
    assert labels == ["0_pre", "0_mid", "1_pre"]
    np.testing.assert_array_equal(stack[1], trace["resid_mid", 0])


def test_decompose_resid_sums_to_the_stream(trace: irkit.Trace) -> None:
    stack, labels = analysis.decompose_resid(trace, return_labels=True)
    assert labels == ["embed", "0_attn_out", "0_mlp_out", "1_attn_out", "1_mlp_out"]
    np.testing.assert_allclose(stack.sum(0), trace["resid_post", -1], atol=1e-4)
    np.testing.assert_allclose(analysis.decompose_resid(trace, 1).sum(0), trace["resid_pre", 1], atol=1e-4)
    inside = analysis.decompose_resid(trace, 1, mlp_input=True)
    np.testing.assert_allclose(inside.sum(0), trace["resid_mid", 1], atol=1e-4)
    _, labels = analysis.decompose_resid(trace, mode="mlp", incl_embeds=False, return_labels=True)
    assert labels == ["0_mlp_out", "1_mlp_out"]


def test_stack_head_results(trace: irkit.Trace) -> None:
    stack, labels = analysis.stack_head_results(trace, incl_remainder=True, return_labels=True)
    assert labels == [*(f"L{layer}H{head}" for layer in range(2) for head in range(4)), "remainder"]
    np.testing.assert_array_equal(stack[6], trace["result", 1][:, :, 2])
    np.testing.assert_allclose(stack.sum(0), trace["resid_post", -1], atol=1e-4)
    assert analysis.stack_head_results(trace, 1).shape[0] == 4


def test_apply_ln_to_stack(trace: irkit.Trace) -> None:
    stack = analysis.decompose_resid(trace, apply_ln=True)
    final = trace["resid_post", -1]
    expected = final / np.sqrt((final.astype(np.float64) ** 2).mean(-1, keepdims=True) + 1e-5)
    np.testing.assert_allclose(stack.sum(0), expected, atol=1e-5)
    inside = analysis.decompose_resid(trace, 1, mlp_input=True, apply_ln=True)
    np.testing.assert_allclose(inside.sum(0), trace["resid_mid", 1] / trace["ln2.scale", 1], atol=1e-5)
    before = analysis.accumulated_resid(trace, 1, apply_ln=True)
    np.testing.assert_allclose(before[-1], trace["resid_pre", 1] / trace["ln1.scale", 1], atol=1e-5)


def test_logit_attrs_sum_to_the_logits(tiny: irkit.Session, trace: irkit.Trace) -> None:
    stack = analysis.decompose_resid(trace)
    logits = trace.logits
    np.testing.assert_allclose(analysis.logit_attrs(tiny, trace, stack, "he").sum(0), logits[..., 256], atol=1e-3)
    right, wrong = np.arange(2)[:, None], 7
    found = analysis.logit_attrs(tiny, trace, stack, right, wrong)
    assert found.shape == (5, *logits.shape[:2])
    expected = np.stack([logits[row, :, row] for row in range(2)]) - logits[..., 7]
    np.testing.assert_allclose(found.sum(0), expected, atol=1e-3)


def test_what_is_missing_is_named(tiny: irkit.Session, trace: irkit.Trace) -> None:
    less = tiny.trace(TEXT, names=("embed", "attn_out"))
    with pytest.raises(OptionError, match="hook_result"):
        analysis.stack_head_results(less)
    with pytest.raises(OptionError, match=r"ln_final\.hook_scale"):
        analysis.logit_attribution(tiny, less, "he")
    with pytest.raises(OptionError, match="there is no 3"):
        analysis.decompose_resid(trace, 3)
    with pytest.raises(OptionError, match="one text"):
        analysis.logit_attribution(tiny, trace, "he")


def test_the_real_model(exact_session: irkit.Session) -> None:
    text = "The capital of France is"
    found = analysis.logit_attribution(exact_session, text, " Paris", " London")
    logits = exact_session.trace(text, names=(), logits="last").logits[0, -1]
    paris, london = (exact_session.tokenize(token)[0] for token in (" Paris", " London"))
    assert found.total == pytest.approx(logits[paris] - logits[london], abs=1e-3)
    assert found.total > 0
    np.testing.assert_allclose(found.attn_bias, 0, atol=1e-3)
