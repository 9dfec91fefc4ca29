"""PointCloudGMM: classical EM before training, the pretrained model, batches of smaller clouds, noise and holes."""

import pytest
import torch
from helpers import assert_close

from em_lightning import EMOperator
from em_lightning.modules import PointCloudGMM
from em_lightning.studies import ProceduralSurfaces
from em_lightning.studies.density_fits import Clouds, Method, baselines, em_scores, kernel_scores, measure, tune
from em_lightning.studies.mixture_report import verdict_by_size
from em_lightning.studies.page import scene, write_page


def surfaces(**options):
    data = ProceduralSurfaces(**{"num_points": 128, "batch_size": 18, "test_clouds": 18, "seed": 3, **options})
    return next(iter(data.test_dataloader()))


def test_an_untrained_module_is_classical_em_under_a_negligible_prior():
    points = surfaces(noise=0.02).points.double()
    module = PointCloudGMM(4, init="farthest", exact_iters=6, num_iters=2).double()
    plain = EMOperator(4, 3, init="farthest", prior=module.operator.prior, residual=False).double()
    assert_close(module(points), plain(points, num_iters=8), atol=1e-9)
    # In float64 the prior of a tenth of a point and of a covariance of 1e-5 changes little.
    without = EMOperator(4, 3, init="farthest", residual=False).double()
    torch.testing.assert_close(module(points).means, without(points, num_iters=8).means, atol=0.02, rtol=0)


def test_iterate_ends_with_the_result():
    points = surfaces().points
    module = PointCloudGMM.pretrained(init="farthest", num_starts=1, exact_iters=4)
    mixtures = list(module.iterate(points))
    assert len(mixtures) == 1 + 4 + 3
    assert_close(mixtures[-1], module(points), atol=1e-6)


@pytest.mark.parametrize("components", [8, 16, 32])
@pytest.mark.parametrize("noise", [0.0, 0.02])
def test_the_pretrained_model_beats_classical_fits_of_sparse_clouds(components, noise):
    batch = surfaces(noise=noise)
    clouds = Clouds(batch.points[:, :64], batch.held_out)
    with torch.no_grad():
        learned = PointCloudGMM.pretrained(num_components=components)(clouds.points).log_prob(clouds.held_out).mean(1)
        rivals = list(kernel_scores(clouds, components))
        for floor in (3e-3, 1e-2, 3e-2):
            rivals += em_scores(clouds, components, floor)
    assert learned.mean() > max(float(rival.scores.mean()) for rival in rivals) + 0.1


def test_the_pretrained_model_keeps_dense_clouds_as_likely_as_em_does():
    batch = surfaces(num_points=2048, noise=0.02, batch_size=6, test_clouds=6)
    module = PointCloudGMM.pretrained(init="farthest", num_starts=1, exact_iters=20)
    with torch.no_grad():
        learned = module(batch.points).log_prob(batch.held_out).mean()
        plain = module.operator.classical()(batch.points, num_iters=23).log_prob(batch.held_out).mean()
    assert learned > plain - 0.02


@pytest.mark.parametrize("factor", [2.0**-20, 2.0**-4, 2.0**10])
def test_a_fit_does_not_depend_on_the_unit_of_length(factor):
    points = surfaces(noise=0.02).points.double()
    module = PointCloudGMM.pretrained(init="farthest", num_starts=1, exact_iters=4).double()
    near = points / 32 if factor < 1 else points * 16  # beyond the range that is fitted as it is
    scale = points.new_full((len(points),), factor)
    assert_close(module(near * factor), module(near).affine(scale, torch.zeros_like(points[:, 0])), rtol=1e-9, atol=0)
    padded = torch.cat([near * factor, near.new_full((len(points), 9, 3), torch.nan)], 1)
    mask = torch.arange(padded.shape[1]).expand(len(points), -1) < points.shape[1]
    origin = torch.zeros_like(points[:, 0])
    fits = (module(near * factor), module(padded, mask))
    # Sums over padded sets are rounded differently.
    assert_close(*(fit.affine(1 / scale, origin) for fit in fits), rtol=1e-8, atol=1e-12)
    *_, last = module.iterate(near * factor)
    assert_close(last, module(near * factor), rtol=1e-9, atol=0)


def test_clouds_of_a_quarter_of_the_usual_size_are_scaled():
    points = surfaces(noise=0.02).points.double()
    points = 1.8 * points / (points.amax(1) - points.amin(1)).amax(-1)[:, None, None]
    module = PointCloudGMM.pretrained(init="farthest", num_starts=1, exact_iters=4).double()
    scale = points.new_full((len(points),), 0.25)
    usual = module(points).affine(scale, torch.zeros_like(points[:, 0]))
    assert_close(module(0.25 * points), usual, rtol=1e-9, atol=0)


def test_clouds_of_usual_size_are_fitted_as_they_are():
    points = surfaces(noise=0.02).points
    module = PointCloudGMM.pretrained(init="farthest", num_starts=1, exact_iters=4)
    start = module.operator.classical()(points, num_iters=4)
    torch.testing.assert_close(module(points).means, module.operator(points, init=start).means, rtol=0, atol=0)
    for small in (torch.randn(2, 1, 3), torch.randn(2, 2, 3), torch.zeros(2, 40, 3)):
        assert all(part.isfinite().all() for part in module(small).parameters())


@pytest.mark.parametrize("arguments", [{"num_features": 2}, {"width": 10}])
def test_the_shape_of_the_trained_weights_is_fixed(arguments):
    ((name, value),) = arguments.items()
    with pytest.raises(ValueError, match=f"{name}={value}"):
        PointCloudGMM.pretrained(**arguments)


def test_small_clouds_get_fewer_classical_iterations():
    module = PointCloudGMM(4, exact_iters=75, num_iters=3)
    lengths = {size: len(list(module.iterate(torch.randn(1, size, 3)))) for size in (32, 128, 256, 512)}
    assert lengths == {size: 1 + exact + 3 for size, exact in ((32, 20), (128, 37), (256, 75), (512, 75))}
    padded, mask = torch.randn(1, 512, 3), torch.arange(512)[None] < 128
    assert len(list(module.iterate(padded, mask))) == lengths[128]


def test_padding_plays_no_part():
    points = surfaces().points
    module = PointCloudGMM.pretrained(init="farthest", num_starts=1)
    padded = torch.cat([points, torch.full((18, 20, 3), torch.nan)], 1)
    mask = torch.arange(148).expand(18, -1) < 128
    torch.testing.assert_close(module(padded, mask).means, module(points).means, atol=1e-3, rtol=0)


def test_training_uses_one_start():
    points = surfaces().points[:4]
    results = []
    for mode, num_starts in ((True, 3), (True, 1), (False, 3)):
        module = PointCloudGMM(6, init="random", num_starts=num_starts, exact_iters=2).train(mode)
        torch.manual_seed(1)
        results.append(module(points).means.detach())
    assert torch.equal(results[0], results[1]) and not torch.equal(results[0], results[2])


def test_other_numbers_of_components_have_the_same_weights():
    module, other = PointCloudGMM.pretrained(), PointCloudGMM.pretrained(num_components=5)
    assert other.operator.num_components == 5 and not other.training
    for one, two in zip(module.state_dict().values(), other.state_dict().values(), strict=True):
        assert torch.equal(one, two)


def test_a_training_batch_is_cut_into_disjoint_clouds_of_one_size():
    module = PointCloudGMM(4, least_points=16)
    batch = surfaces()
    sizes = set()
    for _ in range(20):
        points, mask, held_out, held_out_mask = module._cut(batch, module.least_points)[:4]
        assert len(points) == len(mask) == len(held_out) == len(held_out_mask)
        assert 16 <= points.shape[1] <= 128 and mask.shape == points.shape[:2]
        assert len(points.flatten(0, 1).unique(dim=0)) == points.shape[0] * points.shape[1]
        sizes.add(points.shape[1])
    assert len(sizes) > 5
    loss = module.step(batch, "train")["loss"]
    loss.backward()
    assert all(value.grad.isfinite().all() for value in module.operator.correction.parameters())


@pytest.mark.parametrize("clouds, points", [(8, 1024), (32, 1024), (100, 64)])
def test_each_cloud_of_a_batch_is_cut_equally_often(clouds, points):
    module = PointCloudGMM(4, least_points=16)
    rows = torch.arange(clouds).float()[:, None, None].expand(-1, points, 3)  # a cloud holds its number
    mask = torch.ones(clouds, points, dtype=torch.bool)
    batch = surfaces()._replace(points=rows, mask=mask, held_out=rows, held_out_mask=mask)
    for _ in range(20):
        cut, _, held_out = module._cut(batch, 16)[:3]
        counts = cut[:, 0, 0].long().bincount(minlength=clouds)
        assert 1 <= counts.min() == counts.max() and len(cut) <= max(64, clouds)
        assert torch.equal(cut[:, 0], held_out[:, 0])


def test_noise_is_drawn_per_cloud_and_holes_are_cut():
    noisy, clean = surfaces(noise=(0.1, 0.2), families=["box"]), surfaces(families=["box"])
    distance = (noisy.points - clean.points).norm(dim=-1).mean(1)
    assert (distance == 0).any() and (distance > 0.1).any()
    whole, cut = surfaces(families=["sphere"], num_points=512), surfaces(families=["sphere"], num_points=512, holes=2)
    assert cut.points.shape == whole.points.shape and cut.mask.all() and cut.held_out_mask.all()
    gap = [
        torch.cdist(each.points[:, :200], each.points).topk(2, largest=False).values[..., 1] for each in (whole, cut)
    ]
    reach = [torch.cdist(whole.held_out, each.points).amin(-1).amax(-1) for each in (whole, cut)]
    assert gap[1].mean() < 1.2 * gap[0].mean() and (reach[1] > 2 * reach[0]).any()
    many = surfaces(families=["sphere"], num_points=64, holes=30)  # up to a third of the points is missing
    assert many.mask.all() and many.held_out_mask.all() and many.held_out.shape[1] == 64
    for noise in ((0.2, 0.1), (0.0, 0.1), -1.0):
        with pytest.raises(ValueError, match="noise="):
            ProceduralSurfaces(noise=noise)


def test_settings_are_chosen_on_validation_clouds():
    batch = surfaces(noise=0.02)
    clouds = Clouds(batch.points[:, :32], batch.held_out)
    method = Method("EM", em_scores, [{"floor": floor} for floor in (1e-6, 1e-2)])
    with torch.no_grad():
        setting = tune(method, clouds, 4)
        assert setting["floor"] == 1e-2
        result = measure(method, clouds, 4, setting)
    assert result.scores.shape == (18,) and result.seconds > 0
    assert len({method.name for size in (32, 1024) for method in baselines(size)}) == len(baselines(32))


def test_the_verdict_names_the_sizes_above_and_below():
    told = verdict_by_size({size: {"EM": torch.zeros(3), "trained operator": torch.full((3,), gain)} for size, gain in
                    ((32, 0.5), (64, -0.25))})  # fmt: skip
    assert told == (
        "The trained operator is above every classical fit at 32 points (+0.500 ± 0.000 over EM) and is not clearly "
        "above every classical fit at 64 points (-0.250 ± 0.000 over EM)."
    )
    within_errors = verdict_by_size({32: {"EM": torch.zeros(2), "trained operator": torch.tensor([-1.0, 1.5])}})
    assert within_errors.startswith(
        "The trained operator is not clearly above every classical fit at 32 points (+0.250"
    )


def test_a_page_of_mixtures_needs_no_network(tmp_path):
    points = surfaces().points[:1]
    mixtures = list(EMOperator(3, 3, residual=False, num_iters=2).iterate(points))
    write_page(tmp_path / "page.html", [scene("box", points, points, {"EM": mixtures})])
    page = (tmp_path / "page.html").read_text()
    assert "http" not in page and page.count('"means"') == 3 and '"title":"box"' in page
