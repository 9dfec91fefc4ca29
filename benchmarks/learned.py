"""Held-out likelihood and time of the pretrained PointCloudGMM and of tuned classical fits, by cloud size.

    python benchmarks/learned.py fits FOLDER [--sizes 32,128] [--noise 0,0.02]   tune and measure all fits
    python benchmarks/learned.py table FOLDER                                     measure the learned fit, print tables
    python benchmarks/learned.py dense FOLDER                                     more components for dense clouds
    python benchmarks/learned.py elsewhere FOLDER [--root raw.zip] [--meshes FOLDER ...]    other data, and other K
    python benchmarks/learned.py resample FOLDER                                  points drawn from the mixtures
    python benchmarks/learned.py steps FOLDER --root raw.zip                      classical EM of 5 to 80 steps
    python benchmarks/learned.py floors FOLDER                                    smaller floors, on validation clouds
    python benchmarks/learned.py times FOLDER                                     milliseconds of one core per cloud
    python benchmarks/learned.py store FOLDER --checkpoints last.ckpt             the file of pretrained()

FOLDER holds the results and, in FOLDER/settings, the settings, which are chosen on validation clouds for each size and
noise level; ``floors`` and ``store`` do not use it. The test clouds of ``fits``, ``table``, ``dense`` and ``steps`` are
drawn from TEST_SEED. Those of ``resample`` and ``times`` are the test split of VAL_SEED, whose validation split, with
other clouds, chooses the settings. To save time, scikit-learn's Bayesian mixture is measured on only 36 test clouds and
its mixture with one start on 90; that with ten starts is measured on all, so that it can be the best fit of ``table``.
"""

import argparse
import inspect
import json
import math
from itertools import product
from pathlib import Path
from time import process_time

import numpy as np
import torch
from sklearn.mixture import BayesianGaussianMixture
from threadpoolctl import threadpool_limits
from trimesh import creation, load_mesh

from em_lightning import EMOperator
from em_lightning.data import PointCloudFolder, Shape
from em_lightning.data.base import generator_of
from em_lightning.modules import PointCloudGMM
from em_lightning.studies import FAMILIES, ProceduralSurfaces
from em_lightning.studies.density_fits import (
    TRAINED,
    Clouds,
    Method,
    Result,
    baselines,
    combinations,
    em_scores,
    fit_sklearn,
    kernel_scores,
    learned,
    measure,
    sklearn_scores,
    tune,
)

SIZES, NOISES = (32, 64, 128, 256, 512, 1024, 2048), (0.0, 0.02)
COMPONENTS = 16
NUM_TEST, NUM_VAL, NUM_FEW_VAL = 306, 54, 18  # 17, 3 and 1 clouds of each of the 18 families
NUM_ELSEWHERE = 24  # clouds of each data set of ``elsewhere`` for scikit-learn's fits, chosen to save time
HELD_OUT = 512  # points per cloud
VAL_SEED = 1000  # its validation split chooses settings; its test split serves ``resample`` and ``times``
TEST_SEED = 4321  # these clouds were first drawn when the model and all settings were fixed
# Arguments of PointCloudGMM, chosen on the validation clouds.
INFERENCE = {"num_starts": 8, "exact_iters": 75}
ONE_START = "learned, one start"
FLAT = ("box", "pyramid", "prism", "table", "chair")  # families whose surfaces consist of planes


def clouds_of(size, noise, split, number, seed=VAL_SEED, **options):
    """Return the first ``number`` generated clouds of a split, with ``size`` points to fit."""
    data = ProceduralSurfaces(num_points=max(SIZES), noise=noise, seed=seed, batch_size=number, **options)
    data.val_clouds = data.test_clouds = number
    batch = next(iter(data.loader(split)))
    return Clouds(batch.points[:, :size], batch.held_out[:, :HELD_OUT])


def are_flat(number):
    """Return whether each of the first ``number`` clouds is of a flat family."""
    return torch.tensor([FAMILIES[i % len(FAMILIES)] in FLAT for i in range(number)])  # families alternate


def methods_of(size):
    """Return the methods for clouds of one size with fine grids, and three further ones."""
    found = baselines(size, fine=True)
    grids = {method.name: method.grid for method in found}
    floors = [setting["floor"] for setting in grids["EM, tuned"]]
    # The shares are scikit-learn's covariance_prior relative to the variance of the points. Sparse clouds need larger
    # shares. On six validation clouds, more degrees of freedom (10, 30) and a mean precision of .1 were no better.
    # The limit 200 separates the sizes 128 and 256.
    shares = (0.1, 0.3, 1.0, 3.0) if size < 200 else (0.01, 0.03, 0.1, 0.3)
    tried = [{**setting, "n_init": 10} for setting in grids["scikit-learn, tuned"]]
    bayesian = combinations(
        covariance_share=shares, weight_concentration_prior=(0.01, 1.0), mean_precision_prior=(0.001,)
    )
    cross_validated = combinations(steps=(5, 20), floors=(floors,))  # the numbers of steps are chosen
    return [
        *found,
        Method("EM, floor cross-validated", cross_validated_scores, cross_validated),
        Method("scikit-learn, n_init=10, tuned", sklearn_scores, tried),
        Method("BayesianGaussianMixture, tuned", bayesian_scores, bayesian),
    ]


def cross_validated_scores(clouds, num_components, steps, floors):
    """Score EM whose floor each cloud chooses by the mean log-likelihood of five folds of its own points."""
    points = clouds.points
    fold = torch.arange(points.shape[1]) % 5
    options = {"init": "kmeans++", "residual": False}
    operators = [EMOperator(num_components, points.shape[-1], covariance_floor=f, **options).eval() for f in floors]
    likelihoods = torch.zeros(len(floors), len(points))
    for i, operator in enumerate(operators):
        for left_out in range(5):  # folds
            mixture = operator(points, (fold != left_out).expand(points.shape[:2]), num_iters=steps)
            likelihoods[i] += mixture.log_prob(points[:, fold == left_out]).sum(1)
    best, scores = likelihoods.argmax(0), torch.zeros(len(points))
    for i in best.unique().tolist():
        chosen = best == i
        part = Clouds(points[chosen], clouds.held_out[chosen])
        (result,) = em_scores(part, num_components, floors[i], steps=steps)
        scores[chosen] = result.scores
    yield Result({"steps": steps, "floors": floors}, scores)


def bayesian_scores(clouds, num_components, covariance_share, **options):
    """Score scikit-learn's Bayesian mixtures, whose covariance_prior is ``covariance_share`` times the variance."""
    scores = []
    for points, held_out in zip(clouds.points.double().numpy(), clouds.held_out.double(), strict=True):
        estimator = BayesianGaussianMixture(
            n_components=min(num_components, len(points)),
            max_iter=300,  # as for scikit-learn's GaussianMixture in density_fits
            random_state=0,
            covariance_prior=covariance_share * points.var() * np.eye(points.shape[1]),
            **options,
        )
        with threadpool_limits(1):
            scores.append(fit_sklearn(estimator, points).log_prob(held_out[None]).mean())
    yield Result({"covariance_share": covariance_share, **options}, torch.stack(scores).float())


def number_of(method):
    """Return the number of test clouds on which a method is measured."""
    return {"BayesianGaussianMixture, tuned": 36, "scikit-learn, tuned": 90}.get(method.name, NUM_TEST)


def uses_sklearn(method):
    """Return whether a method fits by scikit-learn, one cloud after the other."""
    return "scikit-learn" in method.name or "Bayesian" in method.name


def first(clouds, number):
    """Return the first clouds."""
    return Clouds(clouds.points[:number], clouds.held_out[:number])


def setting_of(folder, method, size, noise):
    """Return the setting that validation clouds choose, from FOLDER/settings if it is there."""
    path = folder / "settings" / f"{method.name}, {size}, {noise:g}.json"
    if not path.exists():
        if len(method.grid) == 1 and "steps" in method.grid[0]:  # without "steps", tune chooses the number of EM steps
            return method.grid[0]
        val = clouds_of(size, noise, "val", NUM_VAL)
        torch.manual_seed(0)
        chosen = tune(method, first(val, NUM_FEW_VAL if uses_sklearn(method) else NUM_VAL), COMPONENTS)
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps({"setting": dict(chosen)}))
    return json.loads(path.read_text())["setting"]


def method_names():
    """Return the names of all methods, which are the same for every size."""
    return [method.name for method in methods_of(SIZES[0])]


def fits(folder, sizes, noises, names, module):
    """Measure each method on the test clouds; results that are in the folder are kept."""
    trained = learned(module)
    for name in names or [*method_names(), trained.name]:
        for size in sizes:
            for noise, method in product(noises, (*methods_of(size), trained)):
                path = folder / f"{method.name}, {size}, {noise:g}.json"
                if method.name != name or path.exists():
                    continue
                setting = {} if method is trained else setting_of(folder, method, size, noise)
                test = clouds_of(size, noise, "test", NUM_TEST, TEST_SEED)
                torch.manual_seed(0)
                result = measure(method, first(test, number_of(method)), COMPONENTS, setting)
                content = {"setting": dict(result.setting), "scores": result.scores.tolist(), "seconds": result.seconds}
                path.write_text(json.dumps(content))
                print(f"{path.stem}: {result.scores.mean():.3f}, {1e3 * result.seconds:.1f} ms, {setting}", flush=True)


def load(folder, method, size, noise):
    """Return what ``fits`` wrote of a method: its setting, scores and seconds; None if there is nothing."""
    path = folder / f"{method}, {size}, {noise:g}.json"
    return json.loads(path.read_text()) if path.exists() else None


def model(path=None, **arguments):
    """Return the trained module of a checkpoint, or the pretrained one for ``None``."""
    if path is None:
        return PointCloudGMM.pretrained(**arguments)
    return PointCloudGMM.load_from_checkpoint(path, **{**INFERENCE, **arguments}).eval()


def measure_module(module, clouds):
    """Return the result of a trained module, which has no setting to choose."""
    return measure(learned(module), clouds, module.operator.num_components, setting={})


def mean_with_error(values):
    """Return mean ± standard error as text."""
    return f"{values.mean():.3f} ± {values.std() / len(values) ** 0.5:.3f}"


def table(folder, modules, one_start, sizes, noises):
    """Print held-out likelihood and time by size and noise, and the paired gain over the best classical fit.

    The best fit is the one over which the gain is smallest, among those that are measured on all test clouds. The gains
    are those of the first module; the others are further seeds. ``one_start`` is the first module with a single start.
    """
    for noise in noises:
        names = method_names()
        print(f"\n### Noise {noise:g}\n\n| method | " + " | ".join(f"N = {size}" for size in sizes) + " |")
        print("|---|" + "---|" * len(sizes))
        results = {size: {name: load(folder, name, size, noise) for name in names} for size in sizes}
        for name in names:
            cells = [
                f"{torch.tensor(found['scores']).mean():.3f} ({1e3 * found['seconds']:.1f} ms)" if found else "-"
                for found in (results[size][name] for size in sizes)
            ]
            print(f"| {name} | " + " | ".join(cells) + " |")
        gain_names = ("gain over the best", "gain, flat", "gain, curved", "gain over n_init=10")
        kinds = ("learned", *gain_names, "learned, each checkpoint")
        lines = {kind: [] for kind in (*kinds, ONE_START, f"gain of {ONE_START} over the best")}
        for size in sizes:
            test = clouds_of(size, noise, "test", NUM_TEST, TEST_SEED)
            own_results = []
            for module in modules:
                torch.manual_seed(0)
                own_results.append(measure_module(module, test))
            scores, seconds = own_results[0].scores, own_results[0].seconds
            lines["learned"].append(f"{scores.mean():.3f} ({1e3 * seconds:.1f} ms)")
            lines["learned, each checkpoint"].append(", ".join(f"{result.scores.mean():.3f}" for result in own_results))
            gains = {}
            for name, rival in results[size].items():
                if rival:
                    other = torch.tensor(rival["scores"])
                    gains[name] = scores[: len(other)] - other
            complete = [name for name, gain in gains.items() if len(gain) == NUM_TEST]
            best = min(complete, key=lambda name: float(gains[name].mean()))
            gain, flat = gains[best], are_flat(NUM_TEST)
            lines["gain over the best"].append(f"{mean_with_error(gain)} ({best})")
            lines["gain, flat"].append(mean_with_error(gain[flat]))
            lines["gain, curved"].append(mean_with_error(gain[~flat]))
            torch.manual_seed(0)
            from_one_start = measure_module(one_start, test)
            lines[ONE_START].append(f"{from_one_start.scores.mean():.3f} ({1e3 * from_one_start.seconds:.1f} ms)")
            lines[f"gain of {ONE_START} over the best"].append(mean_with_error(gain + from_one_start.scores - scores))
            over_ten_starts = gains.get("scikit-learn, n_init=10, tuned")
            cell = "-" if over_ten_starts is None else f"{mean_with_error(over_ten_starts)} ({len(over_ten_starts)})"
            lines["gain over n_init=10"].append(cell)
        for name, cells in lines.items():
            print(f"| {name} | " + " | ".join(cells) + " |", flush=True)


def dense(folder, sizes):
    """Print the gain of the learned fit over tuned EM and kernel densities by number of components, with noise .02.

    The last lines, on validation clouds, compare a kernel density of 2,048 points with EM of 16 and 32 components that
    is fitted to 16,384 points, an approximate upper bound for fits with as many components.
    """
    print("| N | K | kernel density | EM, tuned | learned | over EM | over the kernel density |\n|---|" + "---|" * 6)
    for size in sizes:
        val = clouds_of(size, 0.02, "val", NUM_VAL)
        clouds = clouds_of(size, 0.02, "test", NUM_TEST, TEST_SEED)
        density_scores = torch.tensor(load(folder, "kernel density", size, 0.02)["scores"])  # written by fits
        for components in (16, 32, 64):
            torch.manual_seed(0)
            # The grid has no "steps": tune also chooses the number of steps, and its setting contains them.
            em = Method("EM, tuned", em_scores, combinations(floor=(1e-6, 1e-5, 1e-4, 3e-4, 1e-3), starts=(8,)))
            setting = tune(em, val, components)
            scores = measure(em, clouds, components, setting).scores
            own = measure_module(model(num_components=components), clouds).scores
            cells = [size, components, *(f"{value.mean():.3f}" for value in (density_scores, scores, own))]
            cells += [mean_with_error(own - scores), mean_with_error(own - density_scores)]
            print(f"| {' | '.join(map(str, cells))} | EM: {setting['floor']:g}, {setting['steps']} steps", flush=True)
    data = ProceduralSurfaces(num_points=16_384, noise=0.02, seed=VAL_SEED, batch_size=9)
    data.val_clouds = NUM_VAL
    scores = {}
    for batch in data.loader("val"):
        held_out = batch.held_out[:, :HELD_OUT]
        (density_result,) = kernel_scores(Clouds(batch.points[:, :2048], held_out), COMPONENTS)
        scores.setdefault("kernel density of 2,048 points", []).append(density_result.scores)
        for components in (16, 32):
            torch.manual_seed(0)
            # 16 starts and 200 steps are chosen: more than any other fit has, for a likelihood near the best.
            options = {"init": "kmeans++", "num_starts": 16, "residual": False}
            operator = EMOperator(components, 3, covariance_floor=1e-6, **options).eval()
            mixture = operator(batch.points, num_iters=200)
            name = f"EM of 16,384 points, K = {components}"
            scores.setdefault(name, []).append(mixture.log_prob(held_out).mean(1))
    density_scores = torch.cat(scores["kernel density of 2,048 points"])
    for name, parts in scores.items():
        likelihood = torch.cat(parts)
        print(f"{name}: {likelihood.mean():.3f}, minus density {mean_with_error(likelihood - density_scores)}")


def primitives():
    """Return meshes made by trimesh."""
    return [
        creation.annulus(r_min=0.5, r_max=1.0, height=0.6),
        creation.axis(origin_size=0.2),
        creation.icosahedron(),
        creation.capsule(height=2.0, radius=0.5),
        creation.torus(1.0, 0.3),
        creation.cone(radius=1.0, height=2.0),
    ]


def draw(meshes, size, noise, number=36):
    """Return clouds of meshes, equally many of each."""
    shapes = [Shape.of(torch.tensor(mesh.vertices), torch.tensor(mesh.faces)) for mesh in meshes]
    points, held_out = [], []
    for i in range(len(meshes) * math.ceil(number / len(meshes))):
        generator = generator_of(7, i)  # seeds 5, 6 and 7 in this file: any fixed numbers
        drawn = shapes[i % len(meshes)].sample(size + HELD_OUT, generator)
        drawn = drawn + noise * torch.randn(drawn.shape, generator=generator)
        points.append(drawn[:size])
        held_out.append(drawn[size:])
    return Clouds(torch.stack(points), torch.stack(held_out))


def geometric_shapes(root, noise):
    """Return the clouds of 1,024 points of all 40 test meshes of GeometricShapes, in one batch."""
    data = PointCloudFolder(root, val_fraction=0.0, num_points=1024, noise=noise, batch_size=40)
    batch = next(iter(data.test_dataloader()))
    return Clouds(batch.points, batch.held_out)


def cases_of(size, root, mesh_folders):
    """Yield data sets that differ from the training data: name, clouds, K and noise."""
    other = {"split": "test", "number": 108, "seed": 2000}  # other clouds than those of the tables, six per family
    plain, noisy = (clouds_of(size, noise, **other) for noise in NOISES)
    for components in (8, 32):
        yield "surfaces, no noise", plain, components, 0.0
        yield "surfaces, noise 0.02", noisy, components, 0.02
    uniform = 2.0 * torch.rand(noisy.points.shape, generator=generator_of(5)) - 1.0  # in the cube around the cloud
    is_outlier = torch.rand(noisy.points.shape[:2], generator=generator_of(6)).unsqueeze(-1) < 0.1
    with_outliers = Clouds(torch.where(is_outlier, uniform, noisy.points), noisy.held_out)
    yield "10 % outliers, noise 0.02", with_outliers, COMPONENTS, 0.02
    yield "holes, noise 0.02", clouds_of(size, 0.02, **other, holes=3), COMPONENTS, 0.02
    loaded = {folder.name: [load_mesh(path) for path in sorted(folder.iterdir())] for folder in mesh_folders}
    for name, meshes in {"trimesh primitives": primitives(), **loaded}.items():
        for noise in NOISES:
            yield f"{name}, noise {noise:g}", draw(meshes, size, noise), COMPONENTS, noise
    if root:
        for noise in NOISES:
            shapes = geometric_shapes(root, noise)
            clouds = Clouds(shapes.points[:, :size], shapes.held_out[:, :HELD_OUT])
            yield f"GeometricShapes, noise {noise:g}", clouds, COMPONENTS, noise


def elsewhere(folder, checkpoint, root, mesh_folders, sizes, names):
    """Print the gain of the trained model, without further training, over each classical fit on other data.

    The fits have the settings that were chosen on generated validation clouds with K = 16; for other K, those of the
    library's fits are chosen anew on NUM_FEW_VAL clouds. The fits of scikit-learn are measured on the first
    NUM_ELSEWHERE clouds of each data set.
    """
    names = names or method_names()
    print(f"| data | K | N | learned | best classical fit | gain | {' | '.join(names)} |")
    print("|---|---|---|---|---|---|" + "---|" * len(names))
    for size in sizes:
        for name, clouds, components, noise in cases_of(size, root, mesh_folders):
            torch.manual_seed(0)
            own = measure_module(model(checkpoint, num_components=components), clouds).scores
            gains = {}
            for method in (method for method in methods_of(size) if method.name in names):
                setting = setting_of(folder, method, size, noise)
                torch.manual_seed(0)
                if components != COMPONENTS and not uses_sklearn(method) and len(method.grid) > 1:
                    setting = tune(method, clouds_of(size, noise, "val", NUM_FEW_VAL), components)
                measured = first(clouds, NUM_ELSEWHERE) if uses_sklearn(method) else clouds
                scores = measure(method, measured, components, setting).scores
                gains[method.name] = own[: len(scores)] - scores
            best = min(gains, key=lambda name: float(gains[name].mean()))
            cells = [name, components, size, f"{own.mean():.3f}", best, mean_with_error(gains[best])]
            cells += [mean_with_error(gain) for gain in gains.values()]
            print(f"| {' | '.join(map(str, cells))} |", flush=True)


def chamfer(one, other):
    """Return the mean distance to the nearest point, both ways, of each pair of clouds."""
    distance = torch.cdist(one, other)
    return 0.5 * (distance.amin(1).mean(1) + distance.amin(2).mean(1))


def resample(folder, module, sizes):
    """Print the chamfer distance of 2,048 drawn points to 2,048 points of the surface itself, times 1,000.

    The settings of EM and MAP-EM are read from the results of ``fits`` for both noise levels.
    """
    columns = ("N", "noise", "fitted points alone", "jittered points, tuned", "EM, tuned", "MAP-EM, tuned", "learned")
    print(f"| {' | '.join(columns)} | learned minus best |")
    print("|---|---|---|---|---|---|---|---|")
    numbers = {"val": NUM_VAL, "test": 108}  # three and six clouds per family
    for size in sizes:
        for noise in NOISES:
            clouds = {split: clouds_of(size, noise, split, number).points for split, number in numbers.items()}
            surfaces = {split: surface_of(split, len(points)) for split, points in clouds.items()}

            def jittered(points, width):
                rows = torch.randint(points.shape[1], (len(points), 2048))
                drawn = points.gather(1, rows.unsqueeze(-1).expand(-1, -1, 3))
                return drawn + width * torch.randn(drawn.shape)

            torch.manual_seed(0)
            widths = (0.0, 0.005, 0.01, 0.02, 0.03, 0.05, 0.08, 0.12)
            width = min(widths, key=lambda w: float(chamfer(jittered(clouds["val"], w), surfaces["val"]).mean()))
            points, target = clouds["test"], surfaces["test"]
            distances = {"alone": chamfer(points, target), "jittered": chamfer(jittered(points, width), target)}
            for name in ("EM, tuned", "MAP-EM, tuned"):
                setting = load(folder, name, size, noise)["setting"]
                options = {
                    "init": "kmeans++",
                    "num_starts": setting["starts"],
                    "residual": False,
                    "prior": setting["prior"],
                }
                operator = EMOperator(COMPONENTS, 3, covariance_floor=setting["floor"], **options).eval()
                distances[name] = chamfer(operator(points, num_iters=setting["steps"]).sample(2048), target)
            best = min(distances, key=lambda name: float(distances[name].mean()))
            distances["learned"] = chamfer(module(points).sample(2048), target)
            cells = [f"{1e3 * value.mean():.1f}" for value in distances.values()]
            gain = mean_with_error(1e3 * (distances["learned"] - distances[best]))
            print(f"| {size} | {noise:g} | " + " | ".join(cells) + f" | {gain} ({best}) |", flush=True)


def surface_of(split, number):
    """Return points without noise (B, M, 3) of the surfaces of ``clouds_of(size, noise, split, number)``."""
    data = ProceduralSurfaces(num_points=max(SIZES), seed=VAL_SEED, batch_size=number)
    data.val_clouds = data.test_clouds = number
    return next(iter(data.loader(split))).held_out


def floors(path, sizes, noises):
    """Print the likelihood of the learned fit, and of EM of 80 steps, by their floor, on 24 validation clouds."""
    print("| N | noise | floor | learned | EM, 80 steps |\n|---|---|---|---|---|")
    for size, noise, floor in product(sizes, noises, (1e-6, 1e-7, 1e-8, 1e-9)):
        val = clouds_of(size, noise, "val", 24)
        torch.manual_seed(0)
        own = measure_module(model(path, covariance_floor=floor), val).scores
        (em,) = em_scores(val, COMPONENTS, floor, starts=8, steps=80)
        print(f"| {size} | {noise:g} | {floor:g} | {own.mean():.3f} | {em.scores.mean():.3f} |", flush=True)


def times(folder, modules, sizes):
    """Print milliseconds of one core per cloud of each method, fitting and evaluating 512 held-out points.

    The last rows are ratios to the time of the learned fit from one start: that of scikit-learn, and that of the
    fastest batched classical fit whose held-out likelihood on test clouds is at most .01 below that of the best one.
    """
    cells = {name: [] for name in [*method_names(), *modules]}
    ratios = {"scikit-learn, tuned": [], "fastest good batched fit": []}
    for size in sizes:
        test = clouds_of(size, 0.02, "test", 32)
        milliseconds, likelihoods = {}, {}
        for method in (*methods_of(size), *(learned(module)._replace(name=name) for name, module in modules.items())):
            stored = {"setting": {}} if method.name in modules else load(folder, method.name, size, 0.02)
            if stored is None:
                continue
            part = first(test, 4 if uses_sklearn(method) else 32)
            measure(method, first(test, 1), COMPONENTS, stored["setting"])  # warm-up
            began = process_time()
            measure(method, part, COMPONENTS, stored["setting"])
            milliseconds[method.name] = 1e3 * (process_time() - began) / len(part.points)
            if method.name not in modules and not uses_sklearn(method):
                likelihoods[method.name] = float(torch.tensor(stored["scores"]).mean())
        for name, row in cells.items():
            row.append(f"{milliseconds[name]:.1f}" if name in milliseconds else "-")
        good = [name for name, value in likelihoods.items() if value > max(likelihoods.values()) - 0.01]
        fastest, own = min(good, key=milliseconds.get), milliseconds[ONE_START]
        ratios["scikit-learn, tuned"].append(f"{milliseconds['scikit-learn, tuned'] / own:.1f}")
        ratios["fastest good batched fit"].append(f"{milliseconds[fastest] / own:.1f} ({fastest})")
    print("| method | " + " | ".join(f"N = {size}" for size in sizes) + " |\n|---|" + "---|" * len(sizes))
    for name, row in [*cells.items(), *((f"{name} / {ONE_START}", row) for name, row in ratios.items())]:
        print(f"| {name} | " + " | ".join(row) + " |", flush=True)


def steps(folder, module, root):
    """Print the likelihood of classical EM by its number of steps, from the starts of the learned fit."""
    data = {"surfaces": clouds_of(1024, 0.0, "test", 108, TEST_SEED)}
    data["surfaces, noise 0.02"] = clouds_of(1024, 0.02, "test", 108, TEST_SEED)
    data["GeometricShapes"] = geometric_shapes(root, 0.0)
    counts = (5, 10, 20, 40, 80)
    columns = [*(f"EM, {count} steps" for count in counts), "EM, tuned", "learned", "learned minus EM, 40 steps"]
    print(f"| data | N | {' | '.join(columns)} |\n|---|---|{'---|' * len(columns)}")
    for (name, whole), size in product(data.items(), (64, 256, 1024)):
        clouds = Clouds(whole.points[:, :size], whole.held_out)
        torch.manual_seed(0)
        plain = module.operator.classical()
        start = plain(clouds.points, num_iters=0)
        scores = {}  # by the number of steps
        for count, mixture in enumerate(plain.iterate(clouds.points, init=start, num_iters=max(counts))):
            scores[count] = mixture.log_prob(clouds.held_out).mean(1)
        setting = load(folder, "EM, tuned", size, 0.02 if "noise" in name else 0.0)["setting"]
        torch.manual_seed(0)
        (tuned,) = em_scores(clouds, COMPONENTS, **setting)
        torch.manual_seed(0)
        own = measure_module(module, clouds).scores
        cells = [f"{float(score.mean()):.3f}" for score in (*map(scores.get, counts), tuned.scores, own)]
        print(f"| {name} | {size} | {' | '.join(cells)} | {mean_with_error(own - scores[40])} |", flush=True)


def store(checkpoint):
    """Write the file of PointCloudGMM.pretrained() from a checkpoint."""
    module = PointCloudGMM.load_from_checkpoint(checkpoint, **INFERENCE)
    # Without those of Lightning, such as _instantiator, which its LightningCLI adds.
    arguments = {name: value for name, value in module.hparams.items() if not name.startswith("_")}
    path = Path(inspect.getfile(PointCloudGMM)).with_suffix(".pt")
    torch.save({"arguments": arguments, "state_dict": module.state_dict()}, path)
    print(f"{path}: {path.stat().st_size} bytes")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "what", choices=("fits", "table", "dense", "elsewhere", "resample", "steps", "floors", "times", "store")
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--sizes", default=",".join(map(str, SIZES)))
    parser.add_argument("--noise", default="0,0.02")
    parser.add_argument("--methods", default="", help="names of methods, separated by semicolons; by default all")
    parser.add_argument("--checkpoints", nargs="*", default=[], help="by default the pretrained model")
    parser.add_argument("--root", help="raw.zip of GeometricShapes")
    parser.add_argument("--meshes", type=Path, nargs="*", default=[], help="folders of mesh files, one data set each")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    paths = args.checkpoints or [None]
    sizes, noises = [int(x) for x in args.sizes.split(",")], [float(x) for x in args.noise.split(",")]
    names = [name for name in args.methods.split(";") if name]
    torch.set_num_threads(1)
    with torch.no_grad():
        if args.what == "fits":
            fits(args.folder, sizes, noises, names, model(paths[0]))
        elif args.what == "table":
            table(args.folder, [model(path) for path in paths], model(paths[0], num_starts=1), sizes, noises)
        elif args.what == "dense":
            dense(args.folder, sizes)
        elif args.what == "elsewhere":
            elsewhere(args.folder, paths[0], args.root, args.meshes, sizes, names)
        elif args.what == "resample":
            resample(args.folder, model(paths[0]), sizes)
        elif args.what == "steps":
            steps(args.folder, model(paths[0]), args.root)
        elif args.what == "floors":
            floors(paths[0], sizes, noises)
        elif args.what == "times":
            times(args.folder, {TRAINED: model(paths[0]), ONE_START: model(paths[0], num_starts=1)}, sizes)
        else:
            store(paths[0])


if __name__ == "__main__":
    main()
