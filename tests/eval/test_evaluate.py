"""One pass over the data against loops that wrap, run and compare by hand."""

import pytest
import timm
import torch
from eval_models import SIDE, tiny_classifier, tiny_vit
from torch.utils.data import IterableDataset, TensorDataset

import vistoken
from vistoken.errors import ConfigError, UnsupportedMethodError
from vistoken.eval.cases import Case, plan_cases
from vistoken.eval.evaluate import Evaluation, evaluate, make_trainer
from vistoken.eval.options import EvalOptions


def run(classifier, data, cases, **settings):
    options = EvalOptions(accelerator="cpu", batch_size=4, **settings)
    return evaluate(classifier, data, cases, options, make_trainer(options))


@pytest.fixture(scope="module")
def classifier():
    return tiny_classifier()


@pytest.fixture(scope="module")
def data():
    torch.manual_seed(3)
    return TensorDataset(torch.randn(11, 3, SIDE, SIDE), torch.randint(10, (11,)))


def by_hand(model, data, method):
    """Top-1, agreement and KL, image by image, in float64 where it is a sum."""
    hits = agree = 0
    kl = 0.0
    for image, label in data:
        with torch.inference_mode():
            dense = model(image[None])[0]
            vistoken.wrap(model, method)
            logits = model(image[None])[0]
            vistoken.unwrap(model)
        hits += int(logits.argmax()) == int(label)
        agree += int(logits.argmax()) == int(dense.argmax())
        p, q = dense.double().softmax(0), logits.double().softmax(0)
        kl += sum(float(a) * float((a / b).log()) for a, b in zip(p, q, strict=True))
    n = len(data)
    return {"top1": hits / n, "agreement": agree / n, "kl": kl / n, "n": n}


@pytest.mark.parametrize("method", ["tome:r=3", "evit:keep_rate=0.5,at=[1,2]", "pool:at=[1]"])
def test_metrics_equal_a_hand_loop_with_an_odd_last_batch(classifier, data, method):
    cases, _ = plan_cases(classifier.model, [method], [])
    dense, reduced = run(classifier, data, cases)
    expected = by_hand(classifier.model, data, method)
    assert {k: reduced[k] for k in expected} == pytest.approx(expected, rel=1e-4)
    assert expected["kl"] > 1e-4
    assert (dense["agreement"], dense["kl"], dense["n"]) == (1.0, 0.0, 11)


def test_model_is_left_without_a_method(classifier, data):
    image = data[0][0][None]
    before = classifier.logits(image)
    cases, _ = plan_cases(classifier.model, ["tome:r=2"], [])
    run(classifier, data, cases, limit=5)
    assert torch.equal(classifier.logits(image), before)
    with pytest.raises(vistoken.NotWrappedError):
        vistoken.info(classifier.model)


def test_limit_counts_images_of_data_sets_and_streams(classifier, data):
    class Stream(IterableDataset):
        def __iter__(self):
            return iter(data)

    cases, _ = plan_cases(classifier.model, ["tome:r=2"], [])
    fixed = run(classifier, data, cases, limit=6)
    stream = run(classifier, Stream(), cases, limit=6)
    assert fixed == stream
    assert fixed[0]["n"] == 6


def test_random_choices_do_not_depend_on_the_other_cases(classifier, data):
    alone, _ = plan_cases(classifier.model, ["random:keep_rate=0.5,at=[1]"], [])
    among, _ = plan_cases(
        classifier.model, ["random:keep_rate=0.3,at=[1]", "random:keep_rate=0.5,at=[1]"], []
    )
    assert run(classifier, data, alone)[-1] == run(classifier, data, among)[-1]
    assert run(classifier, data, alone, seed=1)[-1]["kl"] != run(classifier, data, alone)[-1]["kl"]


@pytest.mark.parametrize("precision", ["bf16-true", "bf16-mixed"])
def test_half_precision_runs_stay_near_float32(classifier, data, precision):
    cases, _ = plan_cases(classifier.model, ["tome:r=3"], [])
    exact = run(classifier, data, cases)[1]
    low = run(tiny_classifier(), data, cases, precision=precision)[1]
    assert low["n"] == exact["n"]
    assert low["kl"] == pytest.approx(exact["kl"], rel=0.5, abs=0.02)
    assert low["kl"] != exact["kl"]


def test_labels_that_the_model_lacks_are_refused(classifier, data):
    labels = torch.full((11,), 12)
    cases, _ = plan_cases(classifier.model, ["tome:r=2"], [])
    with pytest.raises(ConfigError, match=r"class 12, the model tells 10 classes"):
        run(classifier, TensorDataset(data.tensors[0], labels), cases)


def test_empty_data_is_refused(classifier, data):
    cases, _ = plan_cases(classifier.model, ["tome:r=2"], [])
    empty = TensorDataset(data.tensors[0][:0], data.tensors[1][:0])
    with pytest.raises(ConfigError, match="0 images cannot be shared"):
        run(classifier, empty, cases)


def test_a_failing_forward_leaves_no_method_behind(classifier):
    module = Evaluation(classifier.model, [Case(None, 1.0, 17)], 10)
    module._trainer = make_trainer(EvalOptions(accelerator="cpu"))
    with pytest.raises(Exception, match=r"."):
        module.reduced(vistoken.ToMe(r=2), torch.randn(1, 3, 32, 32), 0)
    with pytest.raises(vistoken.NotWrappedError):
        vistoken.info(classifier.model)


@pytest.mark.parametrize("budget", [0.9, 0.75, 0.6])
def test_budgets_are_met_and_not_wasted(budget):
    model = timm.create_model("deit_tiny_patch16_224", num_classes=10)
    cases, notes = plan_cases(model, [], [budget])
    dense = cases[0].gflops
    assert dense == pytest.approx(vistoken.flops(model))
    assert notes == []
    assert [case.label.partition(":")[0] for case in cases[1:]] == list(vistoken.methods.METHODS)
    for case in cases[1:]:
        assert case.gflops == pytest.approx(vistoken.flops(model, case.method))
        # Pooling can only choose among blocks, so it may stay further below.
        slack = 0.075 if case.label.startswith("pool") else 0.02
        assert budget - slack < case.gflops / dense <= budget + 1e-9


def test_cases_that_cannot_be_are_noted_or_raised():
    model = tiny_vit()
    _, notes = plan_cases(model, ["pool"], [0.01])
    assert "pool at 0.01 of the dense cost was left out" in notes[0]
    headless = timm.create_model(
        "vit_tiny_patch16_224", img_size=SIDE, embed_dim=48, depth=4, num_heads=3,
        class_token=False, global_pool="avg",
    )  # fmt: skip
    cases, notes = plan_cases(headless, [], [0.7])
    assert not any(case.label.startswith("evit") for case in cases)
    assert any("evit was left out" in note for note in notes)
    with pytest.raises(UnsupportedMethodError, match="class token"):
        plan_cases(headless, ["evit"], [0.7])
    with pytest.raises(ConfigError, match="unknown method 'nope'"):
        plan_cases(model, ["nope"], [0.7])
