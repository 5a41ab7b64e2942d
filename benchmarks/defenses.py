"""Defenses against an attacker that does not know them, and one that does: Inverting Gradients on CIFAR-10.

    python benchmarks/defenses.py [PART ...] [--model NAME] [--epochs N] [--per-class N] [--steps N] [--weights W ...]

Needs the extras `demo` and `data` and CIFAR-10 prepared by TFDS (GIA_JAX_DATA_DIR). Both attackers choose one weight of
total variation for each defense, of the same list, on training images; it is frozen before the victims are seen.
"""

import argparse
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import record
from flax import nnx
from parts import run_parts
from scipy import stats
from training import train_lenet

from gia_jax import Batch, Observation, ThreatModel, clients, data, defenses, keep_best, labels, metrics, models, report
from gia_jax.attacks import inverting_gradients
from gia_jax.base import Params
from gia_jax.cases import NUM_OTHERS
from gia_jax.defenses.mixing import as_probabilities
from gia_jax.matching.objectives import cosine
from gia_jax.protection import Part, Protected, encoded, parse, protect
from gia_jax.study import study
from gia_jax.threat import observe

CLASSES, THREAT = 10, ThreatModel(labels=True)
# Three strengths of each where it has one; noise in units of an entry of the update, clipping at a norm below LeNet's.
DEFENSES = (
    *(f"prune:ratio={ratio}" for ratio in (0.5, 0.9, 0.99)),
    *(f"topk:ratio={ratio}" for ratio in (0.9, 0.99, 0.999)),
    "clip:norm=1",
    *(f"gaussian:scale={scale}" for scale in (1e-3, 1e-2, 1e-1)),
    *(f"laplace:scale={scale}" for scale in (1e-3, 1e-2, 1e-1)),
    *(f"dpsgd:noise_multiplier={multiplier},norm=1" for multiplier in (1e-3, 1e-2, 1e-1)),
    "sign",
    *(f"quantize:bits={bits}" for bits in (8, 4, 2)),
    *(f"soteria:ratio={ratio}" for ratio in (0.4, 0.8, 0.95)),
    "precode",
    *(f"mixup:k={k}" for k in (2, 4, 6)),
    *(f"instahide:k={k}" for k in (1, 2, 4)),
    "prune_mixup",
    "prune_instahide",
)


class Victims(NamedTuple):
    """Images of a fixed list, in [0, 1] and in the model's space, batch 1; and others of the same client."""

    pixels: np.ndarray
    truth: Batch
    others: Batch
    images: data.ImageData


class Result(NamedTuple):
    """Of every victim: PSNR, SSIM, rank among 10,000 images and the attacker's loss."""

    psnr: np.ndarray
    ssim: np.ndarray
    rank: np.ndarray
    loss: np.ndarray


def victims_of(split: str, per_class: int) -> Victims:
    """The first images of each class by their ids; the next ones are the clients' others."""
    images = data.load("cifar10", split=split, limit=2_000)
    places = [np.flatnonzero(images.labels == c) for c in range(CLASSES)]
    chosen = np.sort(np.concatenate([place[:per_class] for place in places]))
    rest = np.setdiff1d(np.arange(len(images.labels)), chosen)[:NUM_OTHERS]

    def batch(index: np.ndarray) -> Batch:
        return Batch(jnp.asarray(images.normalize(images.images[index])), jnp.asarray(images.labels[index]))

    truth = jax.tree.map(lambda leaf: leaf[:, None], batch(chosen))
    return Victims(images.images[chosen][:, None], truth, batch(rest), images)


class Setting(NamedTuple):
    """A network at a stage of its training, and its defended clients by name."""

    params: Params
    protected: dict[str, Protected]
    stage: str


def setting_of(args: argparse.Namespace) -> Setting:
    if args.model == "lenet":
        module: nnx.Module = models.LeNet((32, 32, 3), CLASSES, rngs=nnx.Rngs(0))
    else:
        module = models.GroupNormNet((32, 32, 3), CLASSES, width=args.width, rngs=nnx.Rngs(0))
    _, params = models.functional(module)
    stage = "untrained"
    if args.epochs:
        if args.model != "lenet":
            raise SystemExit("--epochs is for the model lenet")
        _, params, train_accuracy, test_accuracy = train_lenet("cifar10", 0, args.epochs)
        stage = f"{args.epochs} epochs, accuracy {train_accuracy:.1%} training, {test_accuracy:.1%} test"
    # PRECODE has parameters of its own, which were not trained.
    names = [name for name in args.defenses if name != "precode" or not args.epochs]
    every = {name: protect(parse(name), module, num_classes=CLASSES) for name in names}
    return Setting(params, {"none": protect((), module, num_classes=CLASSES)} | every, stage)


def see(setting: Setting, name: str, victims: Victims, seed: int) -> Observation:
    protected = setting.protected[name]
    params = protected.params if name == "precode" else setting.params

    def of_one(key: jax.Array, batch: Batch) -> Observation:
        key_encode, key_client, key_threat = jax.random.split(key, 3)
        encoding = encoded(protected.encode_fn, key_encode, batch, victims.others)
        encoding = Batch(encoding.inputs, as_probabilities(encoding, CLASSES))
        client_fn = protected.client_fn(key_client)
        return observe(key_threat, THREAT, client_fn, params, encoding, num_classes=CLASSES)._replace(params=())

    keys = jax.random.split(jax.random.fold_in(jax.random.key(seed), 7), len(victims.pixels))
    return jax.jit(jax.vmap(of_one))(keys, victims.truth)._replace(params=params)


def attack(
    client_fn: Any, objective_fn: Any, observations: Observation, victims: Victims, weight: float, args: Any, name: str
) -> Result:
    """The attack on all observations, which repeat the list of victims."""
    low, high = victims.images.bounds()
    ig = inverting_gradients(
        client_fn,
        bounds=(low.astype(np.float32), high.astype(np.float32)),
        num_steps=args.steps,
        total_variation_weight=weight,
        objective_fn=objective_fn,
    )
    began = time.perf_counter()
    found = study(keep_best(ig), jax.random.key(0), observations, num_steps=args.steps, lanes=args.lanes)
    times = len(found.losses) // len(victims.pixels)
    truth = jax.tree.map(lambda leaf: jnp.concatenate([leaf] * times), victims.truth)
    scores = report.score(found.reconstruction.batch, truth, victims.images)
    gallery = jnp.asarray(data.load("cifar10", split="test").images)
    where = jnp.asarray([_place(gallery, image) for image in victims.pixels[:, 0]] * times)
    rank_fn = jax.jit(lambda image, index: metrics.retrieval_rank(image, gallery, index))
    ranks = [int(rank_fn(image, index)) for image, index in zip(scores.images[:, 0], where)]
    print(f"{name}: {time.perf_counter() - began:.0f} s", flush=True)
    return Result(scores.psnr[:, 0], scores.ssim[:, 0], np.asarray(ranks), found.reconstruction.loss)


def _place(gallery: Any, image: np.ndarray) -> int:
    return int(jnp.argmin(jnp.sum(jnp.square(gallery - image), (1, 2, 3))))


def joined(observations: Sequence[Observation]) -> Observation:
    params = observations[0].params
    together = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *[o._replace(params=()) for o in observations])
    return together._replace(params=params)


def blind(setting: Setting, names: Sequence[str], victims: Victims, weight: float, args: Any) -> dict[str, Result]:
    """One program for all the defenses that share parameters: the attacker takes every client for an undefended one."""
    number, found = len(victims.pixels), {}
    for group in ([name for name in names if name != "precode"], [name for name in names if name == "precode"]):
        if not group:
            continue
        plain = setting.protected["precode" if group == ["precode"] else "none"]
        together = joined([see(setting, name, victims, 0) for name in group])
        result = attack(plain.assumed_fn, cosine, together, victims, weight, args, f"blind, {len(group)} defenses")
        for i, name in enumerate(group):
            found[name] = Result(*(field[i * number : (i + 1) * number] for field in result))
    return found


def adaptive(setting: Setting, name: str, victims: Victims, weight: float, args: Any) -> Result:
    protected = setting.protected[name]
    objective_fn = protected.adapt_fn(cosine)
    return attack(
        protected.assumed_fn, objective_fn, see(setting, name, victims, 0), victims, weight, args, f"adaptive, {name}"
    )


def differs(name: str) -> bool:
    """Whether knowing the defense changes the attack: it does not for clipping, rounding and mixing alone."""
    return not all(part.name in ("clip", "quantize", "ternary", "mixup", "instahide") for part in parse(name))


def loss_at_truth(setting: Setting, name: str, victims: Victims) -> np.ndarray:
    """The adaptive attacker's objective, without priors, at what the client really computed on."""
    protected = setting.protected[name]
    objective_fn, seen = protected.adapt_fn(cosine), see(setting, name, victims, 0)
    plain = see(setting._replace(protected={name: undrawn(protected)}), name, victims, 0)
    return np.asarray(jax.jit(jax.vmap(objective_fn))(plain.update, seen.update))


def undrawn(protected: Protected) -> Protected:
    """The client as its attacker knows it, on the encoding of the true one."""
    return protected._replace(client_fn=lambda key: protected.assumed_fn)


def van_trees(setting: Setting, part: Part, victims: Victims) -> float:
    """The largest mean PSNR that any attacker can reach in expectation over a Gaussian prior, in dB."""
    few = jax.tree.map(lambda leaf: leaf[:8, 0], victims.truth)
    client_fn = setting.protected["none"].assumed_fn
    scale = part.settings.get("scale", 0)
    if part.name == "dpsgd":
        scale, norm = part.settings["noise_multiplier"] * part.settings["norm"], part.settings["norm"]
        loss_fn = clients.cross_entropy(setting.protected["none"].apply_fn)
        client_fn = defenses.dp_sgd(loss_fn, jax.random.key(0), norm=norm, noise_multiplier=0.0)
    information = jax.jit(
        lambda params, batch: metrics.fisher_information(client_fn, params, batch, scale, batch_size=256)
    )(setting.params, few)
    train = data.load("cifar10", split="train", limit=10_000)
    pixels = train.images.reshape(len(train.images), -1)
    covariance = jnp.asarray(np.cov(pixels, rowvar=False), jnp.float32)
    per_pixel = jnp.asarray(np.broadcast_to(train.std, train.images.shape[1:]).reshape(-1), jnp.float32)
    bound = metrics.van_trees_bound(information / per_pixel[:, None] / per_pixel[None], covariance)
    return float(-10 * jnp.log10(bound))


def interval(difference: np.ndarray) -> str:
    """Mean of paired differences, and a bootstrap interval of 95 %."""
    if np.ptp(difference) == 0:
        return f"{difference.mean():+.2f}"
    found = stats.bootstrap((difference,), np.mean, n_resamples=2_000, rng=np.random.default_rng(0))
    return f"{difference.mean():+.2f} [{found.confidence_interval.low:+.2f}, {found.confidence_interval.high:+.2f}]"


def figures(name: str, result: Result) -> dict[str, str]:
    return {
        f"{name} PSNR": f"{result.psnr.mean():.2f}",
        f"{name} SSIM": f"{result.ssim.mean():.2f}",
        f"{name} >= 20 dB": f"{np.mean(result.psnr >= 20):.0%}",
        f"{name} rank": f"{np.median(result.rank):.0f}",
    }


def table(args: argparse.Namespace) -> None:
    """Blind, adaptive and prior-only attackers for every defense."""
    setting = setting_of(args)
    tuning, victims = victims_of("train", 1), victims_of("test", args.per_class)
    names = list(setting.protected)
    adapting = [name for name in names if name != "none" and differs(name)]

    tuned_blind: dict[str, dict[float, float]] = {name: {} for name in names}
    tuned_adaptive: dict[str, dict[float, float]] = {name: {} for name in adapting}
    for weight in args.weights:
        for name, result in blind(setting, names, tuning, weight, args).items():
            tuned_blind[name][weight] = result.psnr.mean()
        for name in adapting:
            tuned_adaptive[name][weight] = adaptive(setting, name, tuning, weight, args).psnr.mean()

    def best(scores: dict[float, float]) -> float:
        return max(scores, key=lambda weight: scores[weight])

    found: dict[str, Result] = {}
    for weight in args.weights:
        group = [name for name in names if best(tuned_blind[name]) == weight]
        found |= blind(setting, group, victims, weight, args) if group else {}
    noise = report.random_updates(jax.random.key(5), see(setting, "none", victims, 0))
    plain = setting.protected["none"]
    prior = attack(plain.assumed_fn, cosine, noise, victims, best(tuned_blind["none"]), args, "prior only")

    rows = []
    for name in names:
        knows = adaptive(setting, name, victims, best(tuned_adaptive[name]), args) if name in adapting else found[name]
        noisy = [part for part in (parse(name) if name != "none" else ()) if part.name in ("gaussian", "dpsgd")]
        rows.append(
            {"defense": name}
            | figures("blind", found[name])
            | figures("adaptive", knows)
            | {
                "adaptive - blind, dB": interval(knows.psnr - found[name].psnr) if name in adapting else "same attack",
                "adaptive - prior only, dB": interval(knows.psnr - prior.psnr),
                "loss": f"{knows.loss.mean():.3f}",
                "objective at the truth": f"{loss_at_truth(setting, name, victims).mean():.3f}",
                "TV": f"{best(tuned_blind[name]):g}"
                + (f", {best(tuned_adaptive[name]):g}" if name in adapting else ""),
                "van Trees, dB": f"{van_trees(setting, noisy[-1], victims):.1f}" if noisy else "-",
            }
        )
    guesses = report.baselines(victims.pixels, data.load("cifar10", split="train", limit=10_000).images)
    listed = ", ".join(f"{name} {psnr.mean():.2f}" for name, psnr in guesses.items())
    stage = "untrained" if not args.epochs else f"{args.epochs}_epochs"
    record.write(
        f"defenses_{args.model}_{stage}",
        f"Defenses, {args.model}, {setting.stage}: attackers that do not and that do know the defense",
        rows,
        f"{len(victims.pixels)} CIFAR-10 test images, the first {args.per_class} of each class by id, batch 1; model, "
        f"client and attack seed 0, 1 restart, {args.steps} steps. Both attackers tuned the weight of total variation "
        f"among {', '.join(f'{w:g}' for w in args.weights)} on the first training image of each class. PSNR in dB "
        f"(means), rank of the true image among the 10,000 test images (median; chance 5,000), differences with a "
        f"paired bootstrap interval of 95 %. Prior only (a random update): {prior.psnr.mean():.2f} dB. Guesses without "
        f"a gradient: {listed} (the nearest is chosen with the truth).\n\nOf mixed images the true one is that of "
        "the largest expected coefficient, and each is attacked from one encoding; decoding several is another table. "
        "The objective at the truth has no prior, the loss has one. 'van Trees': no attacker's mean squared error is "
        "less, in expectation over a Gaussian with the data's covariance (8 victims' Fisher information).\n\n"
        f"Threat model: {THREAT.describe()}; the adaptive attacker knows the defense and its strength, not its key.",
    )


def cost(args: argparse.Namespace) -> None:
    """What a defense costs the client: ResNet-18, one step on 1 and on 128 images."""
    apply_fn, params = models.functional(models.MODELS["resnet18"]((32, 32, 3), CLASSES, rngs=nnx.Rngs(0)))
    loss_fn = clients.cross_entropy(apply_fn)
    update = jax.tree.map(lambda leaf: 1e-3 * jax.random.normal(jax.random.key(leaf.size), leaf.shape), params)
    key, size = jax.random.key(0), sum(leaf.size for leaf in jax.tree.leaves(params))
    transformations = {
        "prune, each tensor": defenses.prune(0.9),
        "prune, global": defenses.prune(0.9, scope="global"),
        "clip": defenses.clip(1.0),
        "gaussian": defenses.gaussian_noise(key, 1e-2),
        "laplace": defenses.laplace_noise(key, 1e-2),
        "sign": defenses.sign(),
        "quantize, 4 bits": defenses.quantize(key, 4),
    }
    steps = {}
    for batch_size in (1, 128):
        batch = Batch(jax.random.normal(key, (batch_size, 32, 32, 3)), jnp.zeros(batch_size, jnp.int32))
        client = jax.jit(clients.federated_sgd(loss_fn))
        steps[batch_size] = milliseconds(lambda client=client, batch=batch: client(params, batch), 3)
    spent = {}
    for name, transformation in transformations.items():
        apply = jax.jit(lambda u, t=transformation: t.update(u, t.init(u))[0])
        spent[name] = milliseconds(lambda apply=apply: apply(update), 7)
    rows = [
        {
            "defense": name,
            "ms": f"{ms:.0f}",
            "of the step, batch 1": f"{ms / steps[1]:.2f}",
            "of the step, batch 128": f"{ms / steps[128]:.3f}",
            "of Gaussian noise": f"{ms / spent['gaussian']:.2f}",
        }
        for name, ms in spent.items()
    ]

    def row(name: str, by_size: dict[int, float]) -> dict[str, str]:
        ratios = {n: f"{by_size[n] / steps[n]:.2f}" if n in by_size else "-" for n in (1, 128)}
        shown = " / ".join(f"{by_size[n]:.0f}" if n in by_size else "-" for n in (1, 128))
        own = {"of the step, batch 1": ratios[1], "of the step, batch 128": ratios[128]}
        return {"defense": name, "ms": shown, **own, "of Gaussian noise": "-"}

    masks = jax.jit(lambda p, x: defenses.kept_features(apply_fn, labels.dense("head"), p, x, ratio=0.8))
    whole: dict[str, dict[int, float]] = {"dp_sgd, whole step": {}, "mixup": {}, "instahide": {}, "soteria": {}}
    for batch_size in (1, 128):
        batch = Batch(jax.random.normal(key, (batch_size, 32, 32, 3)), jnp.zeros(batch_size, jnp.int32))
        private = defenses.dp_sgd(loss_fn, key, norm=1.0, noise_multiplier=1.0, microbatch_size=1)
        share = jax.jit(private)
        whole["dp_sgd, whole step"][batch_size] = milliseconds(lambda share=share, b=batch: share(params, b), 1)
        for name, make in (("mixup", defenses.mixup), ("instahide", defenses.instahide)):
            encode = jax.jit(make(CLASSES, k=min(4, batch_size)))
            whole[name][batch_size] = milliseconds(lambda encode=encode, b=batch: encode(key, b), 7)
        if batch_size == 1:
            whole["soteria"][1] = milliseconds(lambda b=batch: masks(params, b.inputs), 1)
    rows += [row(name, by_size) for name, by_size in whole.items()]
    record.write(
        "defenses_cost",
        f"What a defense costs a client: ResNet-18, {size:,} parameters",
        rows,
        f"Medians, milliseconds beside the undefended step (batch 1: {steps[1]:.0f} ms, batch 128: {steps[128]:.0f} "
        "ms), one process. DP-SGD is the whole client, one example at a time (batch 1 / 128), the input defenses are "
        "the encoding (batch 1 / 128, k = 1 for the first), Soteria its scores.",
    )


def milliseconds(fn: Callable[[], Any], repeats: int) -> float:
    jax.block_until_ready(fn())
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        jax.block_until_ready(fn())
        times.append(1e3 * (time.perf_counter() - began))
    return float(np.median(times))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=["lenet", "groupnorm_net"], default="lenet")
    parser.add_argument("--width", type=int, default=8, help="of groupnorm_net")
    parser.add_argument("--epochs", type=int, default=0, help="of training before the attack")
    parser.add_argument("--per-class", type=int, default=7, help="victims of each class")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--lanes", type=int, default=16)
    parser.add_argument("--weights", type=float, nargs="+", default=[1e-1, 1e-2, 1e-3], help="of total variation")
    parser.add_argument("--defenses", nargs="+", default=list(DEFENSES))
    run_parts(parser, table, cost)


if __name__ == "__main__":
    main()
