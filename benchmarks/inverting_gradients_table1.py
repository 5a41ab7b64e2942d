"""Table 1 of Inverting Gradients (Geiping et al., NeurIPS 2020) on CIFAR-10, and what lies around it.

    python benchmarks/inverting_gradients_table1.py [PART ...] [--victims N] [--seeds N] [--steps N]

Needs the extras `demo` and `data`, CIFAR-10 prepared by TFDS (GIA_JAX_DATA_DIR), and for the part `lbfgs` the extra
`peers`. Victims are the first images of the test set by their ids, but for the sweep, which uses training images.
"""

import argparse
import functools
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import record
from flax import nnx
from parts import run_parts
from training import train_network

from gia_jax import (
    Batch,
    ThreatModel,
    clients,
    control,
    data,
    gradient_matching,
    keep_best,
    labels,
    matching,
    metrics,
    models,
    observe,
)
from gia_jax.attacks import inverting_gradients, linear_inversion
from gia_jax.base import Attack, ClientFn, Params
from gia_jax.matching.initializations import given
from gia_jax.matching.optimizers import fixed_step_lbfgs
from gia_jax.matching.second_order import NUM_STARTS, NUM_STEPS, NUM_WARM_UP_STEPS
from gia_jax.report import progress
from gia_jax.sweep.study import Study, study, study_analytic

THREAT = ThreatModel(labels=True)
CLASSES = 10


class Victims(NamedTuple):
    """Images, in [0, 1] and in the model's space, with a leading axis of victims."""

    pixels: np.ndarray
    truth: Batch
    images: data.ImageData

    @property
    def bounds(self) -> tuple[Any, Any]:
        """Darkest and brightest pixel in the model's space."""
        low, high = self.images.bounds()
        return low.astype(self.truth.inputs.dtype), high.astype(self.truth.inputs.dtype)


def victims_of(number: int, *, batch_size: int = 1, split: str = "test") -> Victims:
    images = data.load("cifar10", split=split, limit=number * batch_size)
    pixels = images.images.reshape(number, batch_size, *images.images.shape[1:]).astype(jnp.result_type(float))
    truth = Batch(jnp.asarray(images.normalize(pixels)), jnp.asarray(images.labels.reshape(number, batch_size)))
    return Victims(pixels, truth, images)


@functools.cache
def gallery(number: int = 10_000) -> np.ndarray:
    return data.load("cifar10", split="train", limit=number).images


def functional(module: nnx.Module) -> tuple[Callable[..., Any], Params]:
    apply_fn, params = models.functional(module)
    return apply_fn, jax.tree.map(lambda leaf: leaf.astype(jnp.result_type(float)), params)


def observe_all(client_fn: ClientFn, params: Params, victims: Victims, seed: int, threat: ThreatModel = THREAT):
    keys = jax.random.split(jax.random.fold_in(jax.random.key(seed), 1), len(victims.pixels))
    one = jax.vmap(lambda key, batch: observe(key, threat, client_fn, params, batch, num_classes=CLASSES))
    return jax.jit(one)(keys, victims.truth)._replace(params=params)


def run(
    attack: Attack,
    client_fn: ClientFn,
    params: Params,
    victims: Victims,
    *,
    num_steps: int,
    seed: int = 0,
    num_restarts: int = 1,
    lanes: int = 8,
    name: str = "",
    prior_only: int = 0,
    threat: ThreatModel = THREAT,
) -> tuple[Study, metrics.Scores, np.ndarray]:
    """The attack on true updates, and on random ones of the same norms for the first `prior_only` victims."""
    observations = observe_all(client_fn, params, victims, seed, threat)
    key = jax.random.key(seed)
    options: dict[str, Any] = {"num_steps": num_steps, "lanes": lanes, "progress_fn": progress(name)}
    found = study(attack, key, observations, num_restarts=num_restarts, **options)
    scores = metrics.score(found.reconstruction.batch, victims.truth, victims.images)
    if not prior_only:
        return found, scores, np.full(0, np.nan)
    few = jax.tree.map(lambda leaf: leaf[:prior_only], (observations.update, observations.extra))
    noise = control(jax.random.fold_in(key, 2), observations._replace(update=few[0], extra=few[1]))
    other = study(attack, key, noise, **options)
    truth = jax.tree.map(lambda leaf: leaf[:prior_only], victims.truth)
    return found, scores, metrics.score(other.reconstruction.batch, truth, victims.images).psnr


def figures(psnr: np.ndarray, ssim: np.ndarray) -> dict[str, str]:
    flat = psnr.ravel()
    deviation = flat.std(ddof=1) if len(flat) > 1 else np.nan
    return {
        "n": str(len(flat)),
        "PSNR mean": f"{flat.mean():.2f}",
        "standard error": f"{deviation / np.sqrt(len(flat)):.2f}",
        "standard deviation": f"{deviation:.2f}",
        "median": f"{np.median(flat):.1f}",
        "min": f"{flat.min():.1f}",
        ">= 20 dB": f"{np.mean(flat >= 20):.0%}",
        "SSIM": f"{ssim.mean():.3f}",
    }


def mean(values: np.ndarray) -> str:
    return f"{values.mean():.2f}" if values.size else "-"


def baselines(victims: Victims) -> str:
    """A sentence with the guesses that use no gradient."""
    guesses = metrics.baselines(victims.pixels.astype(np.float32), gallery())
    listed = ", ".join(f"{name} {mean(psnr)}" for name, psnr in guesses.items())
    where = "the nearest of 10,000 training images is chosen with the truth"
    return f"Guesses without a gradient, mean PSNR: {listed} ({where})."


def cost(found: Study) -> dict[str, str]:
    return {"compile s": f"{found.timing.compile_seconds:.0f}", "run s": f"{found.timing.run_seconds:.0f}"}


def lenet_client(seed: int, **options: Any) -> tuple[ClientFn, Params]:
    apply_fn, params = functional(models.LeNet((32, 32, 3), CLASSES, rngs=nnx.Rngs(seed), **options))
    return clients.federated_sgd(clients.cross_entropy(apply_fn)), params


def cosine_attack(client_fn: ClientFn, victims: Victims, steps: int, weight: float = 1e-2) -> Attack:
    attack = inverting_gradients(client_fn, bounds=victims.bounds, num_steps=steps, total_variation_weight=weight)
    return keep_best(attack)


def sweep(args: argparse.Namespace) -> None:
    """The weight of total variation, chosen on training images."""
    victims, (client_fn, params) = victims_of(32, split="train"), lenet_client(0)
    rows = []
    for weight in (1e-1, 1e-2, 1e-3, 1e-4):
        attack = cosine_attack(client_fn, victims, args.steps, weight)
        found, scores, _ = run(attack, client_fn, params, victims, num_steps=args.steps, name=f"TV {weight:g}")
        rows.append({"TV weight": f"{weight:g}", **figures(scores.psnr, scores.ssim), **cost(found)})
    record.write(
        "sweep",
        "Inverting Gradients: weight of total variation, LeNet untrained, 32 CIFAR-10 training images",
        rows,
        f"Model seed 0, attack seed 0, 1 restart, {args.steps} steps. Threat model: {THREAT.describe()}.",
    )


def cosine(args: argparse.Namespace) -> None:
    """The cell of the paper: LeNet untrained, cosine, signed Adam."""
    victims, rows, every = victims_of(args.victims), [], []
    for seed in range(args.seeds):
        client_fn, params = lenet_client(seed)
        attack = cosine_attack(client_fn, victims, args.steps)
        found, scores, prior = run(
            attack, client_fn, params, victims, num_steps=args.steps, seed=seed, name=f"seed {seed}", prior_only=16
        )
        every.append(scores)
        rows.append(
            {"model seed": str(seed), **figures(scores.psnr, scores.ssim), "prior only": mean(prior)} | cost(found)
        )
    psnr, ssim = np.stack([s.psnr for s in every]), np.stack([s.ssim for s in every])
    seconds = {"compile s": "", "run s": ""}
    rows.append({"model seed": "all", **figures(psnr, ssim), "prior only": "", **seconds})
    record.write(
        "cosine",
        f"Inverting Gradients, Table 1: LeNet untrained, CIFAR-10 test_00000..{args.victims - 1:05d}, batch 1",
        rows,
        f"Published for this cell: 18.00 +- 3.33 dB (standard deviation over 100 images).\n\n"
        f"{args.steps} steps of signed Adam, TV 1e-2, 1 restart, the best iterate by the attacker's loss; model and "
        f"attack seed as in the row. PSNR in dB after clipping to [0, 1]. Run s: for the row's {args.victims} images. "
        f"Prior only: the same attack on random updates of the same norms, 16 images.\n\n"
        f"{baselines(victims)}\n\nThreat model: {THREAT.describe()}.",
    )


def lbfgs(args: argparse.Namespace) -> None:
    """The other column: Euclidean, L-BFGS; beside PyTorch's own from the same starts."""
    import torch

    torch.set_num_threads(1)  # as fast as two for so small a net, and steadier
    number, restarts, outer = 8, 4, 300
    victims, (client_fn, params) = victims_of(number), lenet_client(0)
    starts = jax.random.normal(jax.random.key(7), (restarts, 1, 32, 32, 3))
    observations = observe_all(client_fn, params, victims, 0)
    losses, psnr, seconds = [], [], []
    for start in starts:
        attack = gradient_matching(client_fn, init_fn=given(start), optimizer=fixed_step_lbfgs())
        one = study(
            keep_best(attack),
            jax.random.key(0),
            observations,
            num_steps=20 * outer,
            lanes=8,
            progress_fn=progress("L-BFGS"),
        )
        losses.append(one.reconstruction.loss)
        psnr.append(metrics.score(one.reconstruction.batch, victims.truth, victims.images).psnr[:, 0])
        seconds.append(one.timing.run_seconds)
    rows = [
        {
            "solver": "gia_jax fixed_step_lbfgs",
            **_many(np.stack(psnr), np.stack(losses)),
            "s an image": f"{sum(seconds) / number:.0f}",
        }
    ]

    began, peer_psnr, peer_loss = time.perf_counter(), np.zeros((restarts, number)), np.zeros((restarts, number))
    for v in range(number):
        for r in range(restarts):
            image, peer_loss[r, v] = torch_lbfgs(
                params,
                np.asarray(victims.truth.inputs[v]),
                int(victims.truth.labels[v, 0]),
                np.asarray(starts[r]),
                outer,
            )
            pixels = victims.images.denormalize(image)
            peer_psnr[r, v] = -10 * np.log10(np.mean((pixels - victims.pixels[v]) ** 2))
            print(f"torch image {v} start {r}: {peer_psnr[r, v]:.1f} dB", flush=True)
    spent = (time.perf_counter() - began) / number
    found = _many(peer_psnr, peer_loss)
    rows.append({"solver": f"torch.optim.LBFGS {torch.__version__}", **found, "s an image": f"{spent:.0f}"})
    record.write(
        "lbfgs",
        "Euclidean matching by L-BFGS without line search, LeNet untrained, 8 CIFAR-10 test images, 4 starts",
        rows,
        "Published, from memory and not checked: 46.25 +- 12.66 dB over 100 images.\n\nThe same starts and weights "
        f"(model seed 0) in float32; {outer} calls of torch's `step` of up to 20 inner iterations, {20 * outer} inner "
        "iterations here. The start of the lowest loss is kept; 'each start' counts them all. Torch ends a call "
        f"early where its change or gradient is small.\n\nThreat model: {THREAT.describe()}.",
        torch=torch.__version__,
    )


def _many(psnr: np.ndarray, losses: np.ndarray) -> dict[str, str]:
    """Figures of starts (first axis) of images, for each of which the start of the lowest loss is kept."""
    chosen = np.argmin(np.where(np.isfinite(losses), losses, np.inf), 0)
    best = psnr[chosen, np.arange(psnr.shape[1])]
    return {
        "n": str(len(best)),
        "images above 30 dB": str(int(np.sum(best > 30))),
        "median": f"{np.median(best):.1f}",
        "chosen": " ".join(f"{value:.1f}" for value in best),
        "each start above 30 dB": f"{int(np.sum(psnr > 30))} of {psnr.size}",
    }


def torch_lbfgs(
    params: Params, image: np.ndarray, label: int, start: np.ndarray, outer: int
) -> tuple[np.ndarray, float]:
    """The same problem by `torch.optim.LBFGS`; the best iterate and its loss."""
    import torch

    weights = []
    for name in ("conv1", "conv2", "conv3"):
        kernel = np.asarray(params[name]["kernel"], np.float32).transpose(3, 2, 0, 1).copy()
        weights += [torch.tensor(kernel), torch.tensor(np.asarray(params[name]["bias"], np.float32))]
    weights += [torch.tensor(np.asarray(params["head"][part], np.float32)) for part in ("kernel", "bias")]
    weights = [weight.requires_grad_() for weight in weights]
    target_label = torch.tensor([label])

    def gradients(inputs: Any, create_graph: bool) -> Any:
        x = inputs.permute(0, 3, 1, 2)
        for layer, stride in enumerate((2, 2, 1)):
            x = torch.sigmoid(
                torch.nn.functional.conv2d(x, weights[2 * layer], weights[2 * layer + 1], stride=stride, padding=2)
            )
        logits = x.permute(0, 2, 3, 1).flatten(1) @ weights[6] + weights[7]
        loss = torch.nn.functional.cross_entropy(logits, target_label)
        return torch.autograd.grad(loss, weights, create_graph=create_graph)

    target = gradients(torch.tensor(image, dtype=torch.float32), False)
    dummy = torch.tensor(start, dtype=torch.float32).requires_grad_()
    optimizer = torch.optim.LBFGS([dummy])
    best, best_loss = start, float("inf")

    def closure() -> Any:
        nonlocal best, best_loss
        optimizer.zero_grad()
        loss = sum(((a - b) ** 2).sum() for a, b in zip(gradients(dummy, True), target, strict=True))
        loss.backward()
        if float(loss) < best_loss:
            best, best_loss = dummy.detach().numpy().copy(), float(loss)
        return loss

    for _ in range(outer):
        optimizer.step(closure)
    return best, best_loss


def run_newton(
    client_fn: ClientFn, params: Params, victims: Victims, name: str, noise: float | None = None, **solver: Any
) -> tuple[Study, metrics.Scores, np.ndarray]:
    """Runs Levenberg-Marquardt from the library's warm-up; or, as a control, from one victim's truth with noise on its
    pixels, which no attacker has.
    """
    optimizer = matching.levenberg_marquardt(**solver)
    if noise is None:
        attack = matching.second_order(functools.partial(gradient_matching, client_fn), optimizer=optimizer)
    else:
        truth = victims.truth.inputs[0]
        unit = jax.random.normal(jax.random.key(0), truth.shape, truth.dtype)
        start = truth + noise / jnp.asarray(victims.images.std, truth.dtype) * unit
        attack = gradient_matching(client_fn, optimizer=optimizer, init_fn=given(start))
    return run(keep_best(attack), client_fn, params, victims, num_steps=NUM_STEPS, lanes=1, name=name)


def newton(
    client_fn: ClientFn, params: Params, victims: Victims, name: str, noise: float | None = None, **solver: Any
) -> dict[str, str]:
    found, scores, _ = run_newton(client_fn, params, victims, name, noise, **solver)
    flat = scores.psnr.ravel()
    return {
        "case": name,
        "n": str(len(flat)),
        ">= 100 dB": str(int(np.sum(flat >= 100))),
        "median": f"{np.median(flat):.1f}",
        "min": f"{flat.min():.1f}",
        "PSNR": " ".join(f"{value:.0f}" for value in flat),
        "final loss": f"{np.max(found.reconstruction.loss):.1e}",
        "compile s": f"{found.timing.compile_seconds:.0f}",
        "s a victim": f"{found.timing.run_seconds / len(scores.psnr):.0f}",
    }


def levenberg_marquardt(args: argparse.Namespace) -> None:
    """The second-order solver, in float64, one start."""
    number = args.newton_victims
    with jax.enable_x64(True):
        rows = [newton(*lenet_client(0), victims_of(number), "sigmoid LeNet, batch 1")]
        name = "levenberg_marquardt" if number == 16 else f"levenberg_marquardt_{number}"
        _write_newton(name, f"Levenberg-Marquardt, LeNet untrained, {number} CIFAR-10 test images", rows)


def levenberg_marquardt_limits(args: argparse.Namespace) -> None:
    """Where the second-order solver ends: other activations, larger batches; and what stops it there."""
    rows = []
    with jax.enable_x64(True):
        # The Jacobian of four images makes 4 TFLOP of normal equations in every step.
        gradients: dict[str, Any] = {"linear_solver": "cg", "cg_steps": 1_000}
        cases = {
            "tanh": ("tanh LeNet, batch 1", lenet_client(0, activation=jax.nn.tanh), 1, {}),
            "gelu": ("GELU LeNet, batch 1", lenet_client(0, activation=jax.nn.gelu), 1, {}),
            "batch_4": ("sigmoid LeNet, batch 4, conjugate gradients", lenet_client(0), 4, gradients),
            "batch_2": ("sigmoid LeNet, batch 2", lenet_client(0), 2, {}),
            "relu": ("ReLU LeNet, batch 1", lenet_client(0, activation=jax.nn.relu), 1, {}),
        }
        for name, client, size, solver in (cases[case] for case in args.cases):
            victims = victims_of(1, batch_size=size)
            rows.append(newton(*client, victims, name, **solver))
            # The control: from the truth with noise on its pixels, which no attacker has.
            rows.append(newton(*client, victims, f"{name}, from the truth with noise at 20 dB", 0.1, **solver))
            print(rows[-2:], flush=True)
            file = "levenberg_marquardt_limits_" + "_".join(args.cases)
            _write_newton(file, "Levenberg-Marquardt: other activations and batches", rows)


def levenberg_marquardt_scales(args: argparse.Namespace) -> None:
    """The control for other activations: the same networks with smaller first weights, so that nothing saturates."""
    rows = []
    with jax.enable_x64(True):
        for activation in (jax.nn.tanh, jax.nn.gelu):
            for scale in (0.5, 0.2):
                client_fn, params = lenet_client(0, activation=activation)
                params = jax.tree.map(lambda leaf, scale=scale: scale * leaf, params)
                rows.append(newton(client_fn, params, victims_of(1), f"{activation.__name__} LeNet, weights x {scale}"))
                print(rows[-1], flush=True)
                _write_newton(
                    "levenberg_marquardt_scales", "Levenberg-Marquardt: other activations by their weights' size", rows
                )


def _write_newton(name: str, title: str, rows: list[dict[str, str]]) -> None:
    record.write(
        name,
        title,
        rows,
        f"Known labels, model seed 0 unless said, attack seed 0, float64: {NUM_WARM_UP_STEPS} bounded steps of L-BFGS "
        f"from {NUM_STARTS} near-grey starts, and at most {NUM_STEPS} of Levenberg-Marquardt from the best of them. "
        f"'final loss' is the largest of the victims. Threat model: {THREAT.describe()}.",
    )


def trained(args: argparse.Namespace) -> None:
    """The trained LeNet: cosine, L-BFGS, Levenberg-Marquardt."""
    epochs = 60
    apply_fn, params, train_accuracy, test_accuracy = train_network(models.LeNet, "cifar10", 0, epochs)
    print(f"accuracy: {train_accuracy:.3f} training, {test_accuracy:.3f} test", flush=True)
    client_fn = clients.federated_sgd(clients.cross_entropy(apply_fn))
    victims, rows = victims_of(16), []
    attack = cosine_attack(client_fn, victims, args.steps)
    found, scores, prior = run(
        attack, client_fn, params, victims, num_steps=args.steps, name="trained, cosine", prior_only=8
    )
    rows.append(
        {
            "attack": "cosine, signed Adam, TV 1e-2",
            **figures(scores.psnr, scores.ssim),
            "prior only": mean(prior),
            **cost(found),
        }
    )
    attack = gradient_matching(client_fn, optimizer=fixed_step_lbfgs())
    found, scores, _ = run(
        keep_best(attack), client_fn, params, victims, num_steps=6_000, num_restarts=4, name="trained, L-BFGS"
    )
    rows.append(
        {
            "attack": "Euclidean, L-BFGS, 4 restarts",
            **figures(scores.psnr, scores.ssim),
            "prior only": "-",
            **cost(found),
        }
    )
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), params)
        found, scores, _ = run_newton(client_fn, wide, victims_of(4), "trained, second order")
    rows.append(
        {"attack": "Levenberg-Marquardt", **figures(scores.psnr, scores.ssim), "prior only": "-", **cost(found)}
    )
    record.write(
        "trained",
        "LeNet trained on CIFAR-10, 16 test images, batch 1",
        rows,
        f"Trained for {epochs} epochs by Adam (batch 128, 3e-3 falling to 0 by a cosine, seed 0): accuracy "
        f"{train_accuracy:.1%} on training and {test_accuracy:.1%} on test images. Published for a trained LeNet, from "
        f"memory and not checked: 18.08 dB (cosine) and 13.24 dB (L-BFGS).\n\n"
        f"{baselines(victims)}\n\nAttack seed 0, cosine {args.steps} steps, "
        f"L-BFGS 6,000, Levenberg-Marquardt {NUM_WARM_UP_STEPS} from {NUM_STARTS} starts + {NUM_STEPS}.\n\n"
        f"Threat model: {THREAT.describe()}.",
    )


def deep(args: argparse.Namespace) -> None:
    """ResNet20-4 and ConvNet, untrained, evaluation statistics."""
    victims, rows, curves, steps = victims_of(5), [], {}, args.deep_steps
    for name in ("convnet", "resnet20_4"):
        apply_fn, params = functional(models.MODELS[name]((32, 32, 3), CLASSES, rngs=nnx.Rngs(0)))
        client_fn = clients.federated_sgd(clients.cross_entropy(apply_fn))
        attack = cosine_attack(client_fn, victims, steps, args.deep_weight)
        found, scores, _ = run(attack, client_fn, params, victims, num_steps=steps, lanes=5, name=name)
        curves[name] = found.losses[:, 0]
        rows.append({"model": name, **figures(scores.psnr, scores.ssim), **cost(found)})
    record.write(
        "deep",
        "Inverting Gradients on deeper nets, untrained, 5 CIFAR-10 test images, batch 1",
        rows,
        f"{steps} steps, TV {args.deep_weight:g}, batch normalisation in evaluation mode, model and attack seed 0, 1 "
        f"restart. {baselines(victims)}\n\nLoss curves: deep_losses.csv.\n\n"
        f"Threat model: {THREAT.describe()}.",
    )
    at = np.unique(np.geomspace(1, steps, 60).astype(int)) - 1
    lines = [",".join(["step", *(f"{name} image {i}" for name in curves for i in range(5))])]
    lines += [",".join([str(t), *(f"{curves[name][i, t]:.5f}" for name in curves for i in range(5))]) for t in at]
    (record.folder() / "deep_losses.csv").write_text("\n".join(lines) + "\n")


def fedavg(args: argparse.Namespace) -> None:
    """Local steps, the learning rate known or not."""
    rate, rows = 1e-2, []

    def averaging(factor: float, epochs: int, minibatch: int | None, order_key: jax.Array | None = None) -> ClientFn:
        return clients.federated_averaging(
            loss_fn, learning_rate=factor * rate, local_epochs=epochs, minibatch_size=minibatch, order_key=order_key
        )

    apply_fn, params = functional(models.LeNet((32, 32, 3), CLASSES, rngs=nnx.Rngs(0)))
    loss_fn = clients.cross_entropy(apply_fn)
    order_key = jax.random.key(11)
    cases = [
        ("1 image, 1 step", 1, clients.federated_sgd(loss_fn), clients.federated_sgd(loss_fn)),
        ("1 image, 5 local steps", 1, averaging(1, 5, None), averaging(1, 5, None)),
        ("1 image, 5 local steps, learning rate taken for twice", 1, averaging(1, 5, None), averaging(2, 5, None)),
        ("4 images, 1 step", 4, clients.federated_sgd(loss_fn), clients.federated_sgd(loss_fn)),
        ("4 images, 2 epochs in twos", 4, averaging(1, 2, 2), averaging(1, 2, 2)),
        ("4 images, 2 epochs in twos, learning rate taken for twice", 4, averaging(1, 2, 2), averaging(2, 2, 2)),
        ("4 images, 2 epochs in twos, order unknown", 4, averaging(1, 2, 2, order_key), averaging(1, 2, 2)),
    ]
    threat = ThreatModel(labels=True, label_order=True)
    for name, batch_size, client_fn, assumed_fn in cases:
        victims = victims_of(8, batch_size=batch_size)
        attack = cosine_attack(assumed_fn, victims, args.steps)
        prior = 8 if name.endswith("1 step") else 0
        found, scores, noise = run(
            attack, client_fn, params, victims, num_steps=args.steps, name=name, prior_only=prior, threat=threat
        )
        rows.append({"client": name, **figures(scores.psnr, scores.ssim), "prior only": mean(noise), **cost(found)})
    record.write(
        "fedavg",
        "Federated averaging, LeNet untrained, 8 CIFAR-10 victims",
        rows,
        f"{baselines(victims_of(8))}\n\nOf the batches of four: {baselines(victims_of(8, batch_size=4))}\n\n"
        f"Local learning rate {rate:g}; cosine, TV 1e-2, {args.steps} steps, 1 restart, model and attack seed 0. The "
        f"labels are known in the order of the batch. Threat model: {threat.describe()}.",
    )


def analytic(args: argparse.Namespace) -> None:
    """The fully connected first layer, in float64."""
    with jax.enable_x64(True):
        victims, rows = victims_of(16), []
        for name, layer in (("linear", "head"), ("mlp", "dense0")):
            apply_fn, params = functional(models.MODELS[name]((32, 32, 3), CLASSES, rngs=nnx.Rngs(0)))
            client_fn = clients.federated_sgd(clients.cross_entropy(apply_fn))
            observations = observe_all(client_fn, params, victims, 0)
            found = study_analytic(linear_inversion(labels.dense(layer)), jax.random.key(0), observations)
            # In float64 all the way: the scores of the other tables round to float32.
            pixels = np.asarray(found.reconstruction.batch.inputs) * victims.images.std + victims.images.mean
            mse = np.mean((np.clip(pixels, 0, 1) - victims.pixels) ** 2, (1, 2, 3, 4))
            psnr = -10 * np.log10(np.maximum(mse, 1e-40))
            rows.append(
                {"model": name, "n": str(len(psnr)), "median": f"{np.median(psnr):.1f}", "min": f"{psnr.min():.1f}"}
                | cost(found)
            )
        record.write(
            "analytic",
            "Analytic inversion of the first layer, 16 CIFAR-10 test images, batch 1, float64",
            rows,
            f"PSNR in dB, model seed 0. Threat model: {THREAT.describe()}.",
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--victims", type=int, default=100, help="images of the part `cosine`")
    parser.add_argument("--newton-victims", type=int, default=16, help="images of the part `levenberg_marquardt`")
    cases = ["tanh", "gelu", "batch_4", "batch_2", "relu"]
    parser.add_argument("--cases", nargs="+", default=cases, choices=cases, help="of `levenberg_marquardt_limits`")
    parser.add_argument("--seeds", type=int, default=3, help="model seeds of the part `cosine`")
    parser.add_argument("--steps", type=int, default=4_800, help="of signed Adam on LeNet")
    parser.add_argument("--deep-steps", type=int, default=1_000, help="of signed Adam on the deeper nets")
    parser.add_argument("--deep-weight", type=float, default=1e-2, help="of total variation on the deeper nets")
    run_parts(
        parser,
        *(
            sweep,
            cosine,
            lbfgs,
            levenberg_marquardt,
            levenberg_marquardt_limits,
            levenberg_marquardt_scales,
            trained,
            deep,
            fedavg,
            analytic,
        ),
    )


if __name__ == "__main__":
    main()
