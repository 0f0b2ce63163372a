"""Contrastive losses against naive loops and closed forms, assignments against POT, the queue against a deque."""

import copy
import math
from collections import deque

import pytest
import torch
import torch.nn.functional as F
from method_checks import assert_equals_naive_loop
from torch._subclasses.fake_tensor import FakeTensorMode

from nnssl_plugin.objectives.contrastive import (
    FeatureQueue,
    dual_softmax,
    info_nce,
    log_dual_softmax,
    nt_xent,
    sinkhorn_with_dustbin,
    symmetric_info_nce,
)

DONE, SKIPPED = torch.tensor(True), torch.tensor(False)


def units(*shape, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(*shape, generator=generator, dtype=dtype), dim=-1)


def cosines(number, *, seed=0, dtype=torch.float64):
    """Cosines (2, N, N) between tokens and noisy copies of them."""
    tokens = units(2, number, 64, seed=seed)
    return (tokens @ F.normalize(tokens + 0.1 * units(2, number, 64, seed=seed + 1), dim=-1).mT).to(dtype)


# ------------------------------------------------------------------ InfoNCE


@pytest.mark.parametrize(("batch", "negatives"), [(1, 5), (4, 9), (3, 0)])
def test_info_nce_equals_a_naive_cross_entropy(batch, negatives):
    query, positive, others = units(batch, 6), units(batch, 6, seed=1), units(negatives, 6, seed=2)
    losses = []
    for q, p in zip(query, positive, strict=True):
        scores = [float(q @ p) / 0.2, *(float(q @ n) / 0.2 for n in others)]
        losses.append(-math.log(math.exp(scores[0]) / sum(map(math.exp, scores))))
    loss = info_nce(query, positive, others, temperature=0.2)
    assert loss.shape == () and loss.item() == pytest.approx(sum(losses) / batch, abs=1e-12)
    logits = torch.cat(((query * positive).sum(1, keepdim=True), query @ others.T), 1) / 0.2
    torch.testing.assert_close(loss, F.cross_entropy(logits, torch.zeros(batch, dtype=torch.long)))


def test_negatives_that_are_not_known_count_nowhere():
    query, positive, negatives = units(3, 6), units(3, 6, seed=1), units(5, 6, seed=2)
    known = torch.tensor([True, False, True, True, False])
    masked = info_nce(query, positive, negatives, temperature=0.2, known=known)
    torch.testing.assert_close(masked, info_nce(query, positive, negatives[known], temperature=0.2))
    query.requires_grad_()
    none = info_nce(query, positive, negatives, temperature=0.2, known=torch.zeros(5, dtype=torch.bool))
    none.backward()
    assert none == 0 and (query.grad == 0).all()


def test_the_queue_tells_features_from_what_it_started_with():
    queue, yes = FeatureQueue(5, 4), torch.tensor(True)
    assert queue.known.tolist() == [False] * 5
    queue.enqueue(torch.randn(3, 4), torch.tensor(False))
    assert not queue.known.any()
    queue.enqueue(torch.randn(3, 4), yes)
    assert queue.known.tolist() == [True] * 3 + [False] * 2
    queue.enqueue(torch.randn(3, 4), yes)
    assert queue.known.all()


@pytest.mark.parametrize("temperature", [0.05, 1.0])
def test_equal_similarities_give_the_logarithm_of_the_candidates(temperature):
    query = units(1, 8).expand(4, -1)
    loss = info_nce(query, query, query[:1].expand(90, -1), temperature=temperature)
    assert loss.item() == pytest.approx(math.log(91), abs=1e-9)
    assert symmetric_info_nce(query, query, temperature=temperature).item() == pytest.approx(math.log(4), abs=1e-9)


def test_the_gradient_pulls_to_the_positive_and_away_from_the_negatives():
    query = units(3, 5).requires_grad_()
    positive, negatives = units(3, 5, seed=1), units(7, 5, seed=2)
    assert torch.autograd.gradcheck(lambda q: info_nce(q, positive, negatives, temperature=0.3), query)
    info_nce(query, positive, negatives, temperature=0.3).backward()
    moved = query - 0.1 * query.grad
    assert ((moved - query) * positive).sum() > 0
    assert ((moved - query) @ negatives.T).mean() < 0


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_symmetric_info_nce_equals_two_cross_entropies_and_does_not_mind_the_order_of_the_views(batch):
    first, second = units(batch, 6), units(batch, 6, seed=1)
    logits, target = first @ second.T / 0.1, torch.arange(batch)
    expected = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
    loss = symmetric_info_nce(first, second, temperature=0.1)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(symmetric_info_nce(second, first, temperature=0.1), loss)
    order = torch.randperm(batch)
    torch.testing.assert_close(symmetric_info_nce(first[order], second[order], temperature=0.1), loss)


def naive_nt_xent(first, second, apart, temperature):
    number, losses = len(first), []
    views = (first, second)
    for view in range(2):
        for i in range(number):
            positive = views[view][i] @ views[1 - view][i] / temperature
            others = [views[v][k] for v in range(2) for k in range(number) if k != i and apart[i, k]]
            logits = torch.stack([positive, *(views[view][i] @ other / temperature for other in others)])
            losses.append(logits.logsumexp(0) - positive)
    return torch.stack(losses).mean()


@pytest.mark.parametrize("number", [1, 2, 5])
@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_nt_xent_equals_a_naive_loop_over_both_views(number, share):
    drawn = torch.rand(number, number, generator=torch.Generator().manual_seed(1))
    apart = (drawn + drawn.mT) / 2 < share

    def draw(generator):
        return [F.normalize(torch.randn(number, 4, generator=generator, dtype=torch.float64), dim=1) for _ in range(2)]

    assert_equals_naive_loop(
        lambda first, second: nt_xent(first, second, temperature=0.2, apart=apart),
        lambda first, second: naive_nt_xent(first, second, apart, 0.2),
        draw,
    )


@pytest.mark.parametrize("number", [1, 3])
def test_nt_xent_of_equal_features_is_the_logarithm_of_the_candidates(number):
    features = torch.ones(number, 4, dtype=torch.float64) / 2
    got = nt_xent(features, features, temperature=0.1)
    assert got == pytest.approx(math.log(1 + 2 * (number - 1)))


def test_views_that_agree_and_differ_from_all_others_cost_nothing():
    views = torch.eye(6)
    assert symmetric_info_nce(views, views, temperature=0.01).item() == pytest.approx(0, abs=1e-6)
    assert info_nce(views[:3], views[:3], views[3:], temperature=0.01).item() == pytest.approx(0, abs=1e-6)


# ------------------------------------------------------------------ dual softmax


@pytest.mark.parametrize("shape", [(2, 7, 9), (5, 5), (1, 1, 1), (2, 3, 4, 6)])
def test_dual_softmax_is_the_product_of_both_and_a_partial_assignment(shape):
    similarity = torch.randn(shape, dtype=torch.float64)
    plan = dual_softmax(similarity, 0.3)
    rows = (similarity / 0.3).exp() / (similarity / 0.3).exp().sum(-1, keepdim=True)
    columns = (similarity / 0.3).exp() / (similarity / 0.3).exp().sum(-2, keepdim=True)
    torch.testing.assert_close(plan, rows * columns)
    torch.testing.assert_close(log_dual_softmax(similarity, 0.3), (rows * columns).log())
    assert plan.min() >= 0 and plan.max() <= 1
    assert plan.sum(-1).max() <= 1 + 1e-12 and plan.sum(-2).max() <= 1 + 1e-12


def test_features_that_tell_nothing_give_twice_the_logarithm_of_their_number():
    features = torch.ones(2, 144, 16) / 4
    loss = -log_dual_softmax(features @ features.mT, 0.1).diagonal(dim1=-2, dim2=-1).mean()
    assert loss.item() == pytest.approx(2 * math.log(144), rel=1e-6)


def test_features_that_tell_all_apart_give_the_identity():
    plan = dual_softmax(torch.eye(20)[None], 0.01)
    torch.testing.assert_close(plan, torch.eye(20)[None])


@pytest.mark.parametrize("temperature", [1e-6, 1e6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_extreme_temperatures_stay_finite(temperature, dtype):
    similarity = cosines(30, dtype=dtype).requires_grad_()
    log_plan = log_dual_softmax(similarity, temperature)
    log_plan.diagonal(dim1=-2, dim2=-1).mean().backward()
    assert log_plan.dtype == torch.float32 and log_plan.isfinite().all() and similarity.grad.isfinite().all()
    assert dual_softmax(similarity, temperature).isfinite().all()


@pytest.mark.parametrize("temperature", [0.0, -1.0])
def test_a_temperature_that_is_not_positive_is_refused(temperature):
    with pytest.raises(ValueError, match="temperature"):
        log_dual_softmax(torch.eye(2), temperature)
    with pytest.raises(ValueError, match="temperature"):
        info_nce(torch.eye(2), torch.eye(2), torch.eye(2), temperature=temperature)
    for loss in (symmetric_info_nce, nt_xent):
        with pytest.raises(ValueError, match="temperature"):
            loss(torch.eye(2), torch.eye(2), temperature=temperature)


# ------------------------------------------------------------------ Sinkhorn


def marginal_errors(plan):
    """Largest relative errors of the sums of rows and of columns."""
    rows, columns = plan.shape[-2] - 1, plan.shape[-1] - 1
    row_mass = torch.tensor([1.0] * rows + [columns], dtype=plan.dtype)
    column_mass = torch.tensor([1.0] * columns + [rows], dtype=plan.dtype)
    return (plan.sum(-1) / row_mass - 1).abs().max(), (plan.sum(-2) / column_mass - 1).abs().max()


@pytest.mark.parametrize("scale", [1, 10])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-6), (torch.float32, 1.3e-6)])
def test_sinkhorn_keeps_its_marginals(scale, dtype, tolerance):
    log_plan = sinkhorn_with_dustbin(scale * cosines(144, dtype=dtype), dustbin=1.0, iterations=100)
    assert log_plan.shape == (2, 145, 145) and log_plan.dtype == dtype
    assert max(marginal_errors(log_plan.exp().double())) < tolerance


@pytest.mark.parametrize(("rows", "columns"), [(12, 12), (7, 11), (1, 1), (1, 4)])
def test_sinkhorn_equals_pots_on_the_augmented_problem(rows, columns):
    ot = pytest.importorskip("ot")
    similarity = torch.randn(2, rows, columns, dtype=torch.float64) * 3
    plan = sinkhorn_with_dustbin(similarity, dustbin=0.7, iterations=500).exp()
    for logits, got in zip(similarity, plan, strict=True):
        augmented = torch.full((rows + 1, columns + 1), 0.7, dtype=torch.float64)
        augmented[:rows, :columns] = logits
        row_mass = torch.tensor([1.0] * rows + [columns], dtype=torch.float64)
        column_mass = torch.tensor([1.0] * columns + [rows], dtype=torch.float64)
        expected = ot.sinkhorn(row_mass, column_mass, -augmented, reg=1.0, numItermax=5000, stopThr=1e-13)
        torch.testing.assert_close(got, expected, atol=1e-8, rtol=0)


def test_sinkhorn_prefers_the_dustbin_where_nothing_matches():
    similarity = torch.full((1, 4, 4), -20.0)
    similarity[0, :3, :3] = 40 * torch.eye(3) - 20
    plan = sinkhorn_with_dustbin(similarity, dustbin=0.0, iterations=50).exp()[0]
    assert plan[:3, :3].diagonal().min() > 0.98 and plan[:3, :3].fill_diagonal_(0).max() < 1e-4
    assert plan[3, 4] > 0.98 and plan[4, 3] > 0.98


def test_the_temperature_matters_for_sinkhorn():
    """The mean diagonal of identical views at logit scale 1 and 10."""
    tokens = units(1, 144, 512)
    low, high = (
        sinkhorn_with_dustbin(scale * tokens @ tokens.mT, dustbin=1.0, iterations=100)
        .exp()[0, :-1, :-1]
        .diagonal()
        .mean()
        for scale in (1, 10)
    )
    assert low < 0.02 and high > 0.8


@pytest.mark.parametrize("iterations", [1, 2, 15])
def test_the_gradient_of_sinkhorn_is_that_of_its_plain_iterations(iterations):
    similarity = torch.randn(2, 5, 4, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(2, 6, 5, dtype=torch.float64)

    def plain(values):
        logits = F.pad(values, (0, 1, 0, 1), value=0.3)
        row_mass, column_mass = torch.tensor([0.0] * 5 + [math.log(4)]), torch.tensor([0.0] * 4 + [math.log(5)])
        for _ in range(iterations):
            logits = logits - logits.logsumexp(-1, keepdim=True) + row_mass[:, None]
            logits = logits - logits.logsumexp(-2, keepdim=True) + column_mass
        return logits

    ours = sinkhorn_with_dustbin(similarity, dustbin=0.3, iterations=iterations)
    torch.testing.assert_close(ours, plain(similarity), atol=1e-6, rtol=0)
    (got,) = torch.autograd.grad((ours * weight).sum(), similarity)
    (expected,) = torch.autograd.grad((plain(similarity) * weight).sum(), similarity)
    torch.testing.assert_close(got, expected, atol=1e-6, rtol=0)


def test_gradcheck_of_sinkhorn():
    similarity = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda s: sinkhorn_with_dustbin(s, dustbin=1.0, iterations=7), similarity)


def test_iterations_of_sinkhorn_keep_no_matrix_for_the_backward():
    def saved(iterations):
        largest = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: largest.append(t) or t, lambda t: t):
            sinkhorn_with_dustbin(torch.randn(1, 30, 30, requires_grad=True), dustbin=1.0, iterations=iterations)
        return len({t.untyped_storage().data_ptr() for t in largest if t.numel() > 31})

    assert saved(20) == saved(1)


def test_sinkhorn_stays_finite_with_large_logits_and_refuses_no_iterations():
    similarity = (1e4 * cosines(20, dtype=torch.float32)).requires_grad_()
    log_plan = sinkhorn_with_dustbin(similarity, dustbin=1.0, iterations=20)
    log_plan.sum().backward()
    assert log_plan.isfinite().all() and similarity.grad.isfinite().all()
    with pytest.raises(ValueError, match="iterations"):
        sinkhorn_with_dustbin(similarity, dustbin=1.0, iterations=0)


# ------------------------------------------------------------------ precision


def losses(first, second, negatives):
    similarity = first.float() @ second.float().mT
    return (
        info_nce(first, second, negatives, temperature=0.1),
        symmetric_info_nce(first, second, temperature=0.1),
        log_dual_softmax(similarity, 0.1),
        sinkhorn_with_dustbin(similarity[None], dustbin=1.0, iterations=10),
    )


def test_autocast_changes_nothing():
    features = [units(n, 32, seed=n, dtype=torch.float32) for n in (6, 6, 20)]
    similarity = features[0] @ features[1].mT
    expected = losses(*features)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = (
            info_nce(*features, temperature=0.1),
            symmetric_info_nce(*features[:2], temperature=0.1),
            log_dual_softmax(similarity, 0.1),
            sinkhorn_with_dustbin(similarity[None], dustbin=1.0, iterations=10),
        )
    assert all(torch.equal(a, b) and a.dtype == torch.float32 for a, b in zip(got, expected, strict=True))


def test_half_precision_features_are_computed_in_float32():
    features = [units(n, 32, seed=n).half() for n in (6, 6, 20)]
    for half, full in zip(losses(*features), losses(*[f.float() for f in features]), strict=True):
        assert half.dtype == torch.float32 and torch.equal(half, full)


# ------------------------------------------------------------------ queue


@pytest.mark.parametrize(("size", "batches"), [(10, [3, 3, 3, 3, 1]), (8, [4, 4, 4]), (5, [7, 2, 13]), (4, [1] * 9)])
def test_the_queue_holds_what_a_deque_holds(size, batches):
    queue = FeatureQueue(size, 6)
    naive = deque(queue.features.clone(), maxlen=size)
    for seed, number in enumerate(batches):
        features = units(number, 6, seed=seed, dtype=torch.float32)
        queue.enqueue(features, DONE)
        naive.extend(features)
        in_order = queue.features.roll(-int(queue.pointer), 0)
        torch.testing.assert_close(in_order, torch.stack(list(naive)))
    assert queue.pointer == sum(batches) % size


def test_after_a_full_pass_no_initial_entry_is_left():
    queue = FeatureQueue(12, 8)
    initial = queue.features.clone()
    for step in range(3):
        queue.enqueue(torch.randn(4, 8), DONE)
        left = (torch.cdist(queue.features, initial) < 1e-3).any(1).sum()
        assert left == 12 - 4 * (step + 1)


def test_a_skipped_step_changes_nothing_even_if_its_features_are_broken():
    queue = FeatureQueue(6, 4)
    queue.enqueue(torch.randn(4, 4), DONE)
    before = copy.deepcopy(queue.state_dict())
    queue.enqueue(torch.full((3, 4), torch.nan), SKIPPED)
    queue.enqueue(torch.randn(9, 4), SKIPPED)
    assert all(torch.equal(before[key], value) for key, value in queue.state_dict().items())


def test_a_queue_goes_on_exactly_from_its_state():
    queue, other = FeatureQueue(6, 4), FeatureQueue(6, 4)
    queue.enqueue(torch.randn(4, 4), DONE)
    other.load_state_dict(copy.deepcopy(queue.state_dict()))
    features = torch.randn(5, 4)
    for one in (queue, other):
        one.enqueue(features, DONE)
    assert torch.equal(queue.features, other.features) and torch.equal(queue.pointer, other.pointer)


def test_the_queue_holds_unit_vectors_without_gradient():
    queue = FeatureQueue(6, 4)
    torch.testing.assert_close(queue.features.norm(dim=1), torch.ones(6))
    features = torch.randn(3, 4, requires_grad=True)
    queue.enqueue((features * 7).half(), DONE)
    torch.testing.assert_close(queue.features.norm(dim=1), torch.ones(6))
    assert queue.features.dtype == torch.float32 and not queue.features.requires_grad
    assert list(queue.parameters()) == []
    query = features / features.norm(dim=1, keepdim=True)
    loss = info_nce(query, query.detach(), queue.features, temperature=0.2)
    loss.backward()
    queue.enqueue(features, DONE)  # after the backward, which reads the queue
    assert features.grad.abs().sum() > 0


def one_step(device):
    first, second = torch.randn(2, 4, 8, device=device, requires_grad=True)
    queue = FeatureQueue(6, 8).to(device)
    similarity = first[None] @ second[None].mT
    total = info_nce(first, second, queue.features, temperature=0.1)
    total = total + symmetric_info_nce(first, second, temperature=0.1) + log_dual_softmax(similarity, 0.1).sum()
    total = total + sinkhorn_with_dustbin(similarity, dustbin=1.0, iterations=3).sum()
    total.backward()
    queue.enqueue(second.detach(), torch.isfinite(total))
    return total, queue.features


def test_nothing_is_read_on_the_host():
    with FakeTensorMode():  # tensors without values: reading one raises
        total, features = one_step("cpu")
    assert total.shape == () and features.shape == (6, 8)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_nothing_waits_for_the_device():
    one_step("cuda")
    features = torch.randn(2, 4, 8, device="cuda")
    queue, applied = FeatureQueue(6, 8).cuda(), torch.ones((), dtype=torch.bool, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        losses(features[0], features[1], queue.features)
        queue.enqueue(features[0], applied)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def naive_info_nce_within_groups(first, second, groups, temperature):
    """Eqs. 4 and 5 of BrainMVP, a pair at a time; negatives share the modality, i.e. the group."""
    losses = []
    for i, group in enumerate(groups.tolist()):
        if group < 0:
            continue
        others = [j for j, other in enumerate(groups.tolist()) if other == group]
        for one, another in ((first, second), (second, first)):
            scores = torch.stack([one[i] @ another[j] / temperature for j in others])
            losses.append(scores.logsumexp(0) - scores[others.index(i)])
    return sum(losses) / len(losses) if losses else 0 * (first.sum() + second.sum())


@pytest.mark.parametrize("groups", [[0, 0, 0, 0], [1, 0, 1, -1, 0, -1], [2], [-1, -1], [0, 1, 2]])
def test_negatives_of_symmetric_info_nce_come_from_the_own_group(groups):
    groups = torch.tensor(groups)

    def draw(generator):
        return [torch.randn(len(groups), 5, generator=generator, dtype=torch.float64) for _ in range(2)]

    assert_equals_naive_loop(
        lambda *pair: symmetric_info_nce(*pair, temperature=0.3, groups=groups),
        lambda *pair: naive_info_nce_within_groups(*pair, groups, 0.3),
        draw,
    )


def test_one_group_is_no_group():
    first, second = torch.randn(2, 5, 4)
    whole, grouped = (symmetric_info_nce(first, second, temperature=0.2, groups=g) for g in (None, torch.ones(5)))
    torch.testing.assert_close(whole, grouped)
