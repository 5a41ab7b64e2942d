"""What a server still inverts behind secure aggregation: sums of more and more clients, and one client's masked update.

With an imprinted layer it reads single images out of a sum.

    python benchmarks/aggregated.py [PART ...] [--victims N] [--steps N] [--views N]

The parts are `sums`, `bits`, `views` and `imprint`. Needs the extras `demo`, `data` and `secure`, and CIFAR-10 prepared
by TFDS (GIA_JAX_DATA_DIR).
"""

import argparse
import collections
import functools
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
import record
from flax import nnx
from parts import run_parts
from scipy import stats
from scipy.spatial.distance import cdist

from gia_jax import Batch, Observation, ThreatModel, data, models
from gia_jax.base import Params, Updates
from gia_jax.cli.aggregated import see_aggregated
from gia_jax.cli.cases import Case, load_case
from gia_jax.cli.names import make_protocol
from gia_jax.cli.outcomes import PRIOR_ONLY
from gia_jax.cli.simulated import attack, see
from gia_jax.clients import cross_entropy, federated_sgd
from gia_jax.secure_aggregation import aggregate, limits, observe
from gia_jax.secure_aggregation.protocol import decode
from gia_jax.secure_aggregation.quantization import RING

CLIP, BITS = 2.0, 22
SUCCESS = 20.0  # dB
MARGIN = 0.5  # dB, of the equivalence tests
THREAT = ThreatModel(labels=True).describe()
KEYS = jax.random.split(jax.random.key(0))
# Of `imprint`.
CLIENTS, BATCH_SIZE, IMPRINT_CLIP = 64, 8, 1.0
RECOVERED = 1e-3  # mean squared error of pixels in [0, 1]


def case_of(victims: int, clients: int) -> Case:
    """The first images of the test set by id; the clients of a victim hold one image each."""
    return load_case("lenet", "cifar10", victims=victims, batch_size=clients)


def psnr_of(case: Case, observations: dict[str, Observation], args: argparse.Namespace) -> dict[str, np.ndarray]:
    """Of every image, shape (v, b), by the name of the observations, from the same starts; the last is the same attack
    on random updates.
    """
    found = {}
    for i, (name, observation) in enumerate(observations.items()):
        outcomes = attack(
            case,
            {name: observation},
            case.protect(()),
            "inverting_gradients",
            KEYS[1],
            model="lenet",
            labels="known",
            num_steps=args.steps,
            lanes=8,
            prior_only=name if i == len(observations) - 1 else None,
        )
        found |= {group: outcome.scores("psnr") for group, outcome in outcomes.items()}
    return found


def unprotected(case: Case) -> Observation:
    """The gradient of the victim's whole batch, as it is."""
    return see(case, {"none": case.protect(())}, KEYS[0], known=[True])[True]["none"]


def aggregated(case: Case, clients: int, name: str, bits: int, target: str) -> Observation:
    """The same behind a protocol."""
    protocol = make_protocol(name, clients, clip=CLIP, bits=bits)
    found = see_aggregated(case, case.protect(()), protocol, KEYS[0], known=True)[target][1]
    assert isinstance(found, Observation)
    return found


def figures(psnr: np.ndarray) -> dict[str, str]:
    share = record.interval(psnr >= SUCCESS, np.mean, ".0%")
    return {"median dB": record.interval(psnr, np.median, ".2f"), f">= {SUCCESS:g} dB": share}


def described(args: argparse.Namespace) -> str:
    return (
        f"Inverting Gradients, {args.steps} steps, 1 start, labels known, untrained LeNet, model and attack seed 0; "
        f"CIFAR-10, the first test images by id, one for each client. SecAgg of {BITS} bits and clip {CLIP:g} unless "
        f"said. PSNR after the best assignment within a victim; intervals of 95 %, bootstrap over victims, differences "
        f"paired, none where theirs covers 0. Threat model: {THREAT}."
    )


def sums(args: argparse.Namespace) -> None:
    """The aggregate of N clients against the same batch without a protocol."""
    rows = []
    for clients in (1, 2, 4, 8, 16):
        case = case_of(args.victims, clients)
        behind = aggregated(case, clients, "secagg", BITS, "aggregate")
        psnr = psnr_of(case, {"unprotected": unprotected(case), "aggregate": behind}, args)
        rows.append(
            {
                "clients": clients,
                **figures(psnr["aggregate"]),
                **{f"unprotected, {name}": text for name, text in figures(psnr["unprotected"]).items()},
                "difference, mean dB": record.gain(np.mean(psnr["aggregate"] - psnr["unprotected"], 1)),
                "prior only, median dB": f"{np.median(psnr[PRIOR_ONLY]):.2f}",
                "grey, median dB": f"{np.median(case.modality.guess_fn(case.truth, case.data.public)['grey']):.2f}",
            }
        )
        print(rows[-1], flush=True)
    notes = f"{args.victims} victims of N clients each; 'unprotected' is the mean gradient itself."
    title = "What the sum of N clients gives away"
    record.write("sums", title, rows, f"{notes} {described(args)}")


def bits(args: argparse.Namespace) -> None:
    """One client alone in the sum, by the bits of an entry."""
    case = case_of(args.victims, 1)
    widths = (8, 10, 12, 16, 20, 25)
    seen = {f"{width}": aggregated(case, 1, "secagg", width, "aggregate") for width in widths}
    psnr = psnr_of(case, {"unprotected": unprotected(case), **seen}, args)
    rows = [
        {
            "bits": name,
            **figures(found),
            "difference, mean dB": "-" if name == "unprotected" else record.gain((found - psnr["unprotected"])[:, 0]),
        }
        for name, found in psnr.items()
    ]
    notes = f"{args.victims} victims, each the only client of a run."
    record.write("bits", "One client alone in the sum, by bits", rows, f"{notes} {described(args)}")


def views(args: argparse.Namespace) -> None:
    """One client's masked upload against fresh noise: two one-sided tests for a difference below the margin."""
    clients, rows = 4, []
    whole = case_of(args.views, clients)
    rng = np.random.default_rng(0)
    for name in ("secagg", "lightsecagg"):
        protocol = make_protocol(name, clients, clip=CLIP, bits=BITS)
        case, seen = see_aggregated(whole, whole.protect(()), protocol, KEYS[0], known=True)["client:0"]
        assert isinstance(seen, Observation)
        like = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), seen.update)
        length = sum(leaf.size for leaf in jax.tree.leaves(like))
        modulus = protocol.quantizer.modulus
        assert modulus <= RING
        drawn = [
            decode(protocol.quantizer, rng.integers(0, modulus, length, np.uint64).astype(np.uint32), like)
            for _ in range(args.views)
        ]
        noise = seen._replace(update=jax.tree.map(lambda *leaves: jnp.stack(leaves), *drawn))
        psnr = psnr_of(case, {"upload": seen, "noise": noise}, args)
        gap = (psnr["upload"] - psnr["noise"])[:, 0]
        tests = [
            stats.ttest_1samp(gap, -MARGIN, alternative="greater").pvalue,
            stats.ttest_1samp(gap, MARGIN, alternative="less").pvalue,
        ]
        rows.append(
            {
                "protocol": name,
                "upload, mean dB": f"{psnr['upload'].mean():.2f}",
                "noise, mean dB": f"{psnr['noise'].mean():.2f}",
                "difference, mean dB": record.gain(gap),
                f"p of a difference of {MARGIN:g} dB or more": f"{max(tests):.1e}",
            }
        )
        print(rows[-1], flush=True)
    notes = f"{args.views} victims, the first of {clients} clients each; the larger p of two one-sided paired t-tests."
    record.write("views", "An attack on one client's masked update", rows, f"{notes} {described(args)}")


def imprint(args: argparse.Namespace) -> None:
    """Single images out of sums over more and more clients, by an imprinted layer."""
    del args
    images = data.load("cifar10", limit=CLIENTS * BATCH_SIZE)
    public = data.load("cifar10", split="train", limit=10_000)
    inputs = images.normalize(images.images.astype(np.float32))
    public_means = public.normalize(public.images.astype(np.float32)).mean((1, 2, 3))
    every = Batch(jnp.asarray(inputs), jnp.asarray(images.labels))
    batches = jax.tree.map(lambda leaf: leaf.reshape(CLIENTS, BATCH_SIZE, *leaf.shape[1:]), every)
    rows = []
    for num_bins in (128, 1024):
        thresholds = np.quantile(public_means, np.arange(1, num_bins + 1) / (num_bins + 1)).astype(np.float32)
        bin_of = np.searchsorted(thresholds, inputs.mean((1, 2, 3)))
        module = models.MLP(inputs.shape[1:], num_classes=10, hidden=(num_bins,), rngs=nnx.Rngs(0))
        apply_fn, params = models.functional(module)
        altered = limits.imprinted(params, ["dense0"], ["head"], jnp.asarray(thresholds))
        client_fn = functools.partial(federated_sgd(cross_entropy(apply_fn)), altered)
        updates = jax.jit(functools.partial(jax.lax.map, client_fn))(batches)
        for clients in (1, 4, 16, 64):
            found = collections.defaultdict(list)
            for start in range(0, CLIENTS, clients):
                part = slice(start * BATCH_SIZE, (start + clients) * BATCH_SIZE)
                sizes = np.bincount(bin_of[part], minlength=num_bins + 1)
                found["alone in a bin"] += list((sizes[bin_of[part]] == 1) & (bin_of[part] > 0))
                own = jax.tree.map(lambda leaf, a=start, b=start + clients: leaf[a:b], updates)
                for name, update in sums_of(own, clients, altered).items():
                    found[name] += list(recovered(images, part, limits.imprint_inversion(update, ["dense0"])))
            share = limits.imprint_share(num_bins, clients * BATCH_SIZE)
            measured = {name: f"{np.mean(hits):.3f}" for name, hits in found.items()}
            rows.append({"bins": num_bins, "clients": clients, "formula": f"{share:.3f}", **measured})
            print(rows[-1], flush=True)
    notes = f"""
The share of {CLIENTS * BATCH_SIZE} CIFAR-10 images, the first of the test set by id and {BATCH_SIZE} a client, of which
the server has a copy with a mean squared error below {RECOVERED:g} (pixels in [0, 1]). Every row is of all of them:
with N clients, out of {CLIENTS} / N sums. The formula is that of an image alone in its bin, for bins that are quantiles
of the images' brightness; the next column counts those alone in the bins used, quantiles of the first 10,000 training
images. 'Floats' is the sum without a protocol; of the others no entry was clipped, at {IMPRINT_CLIP:g}. A perceptron
with one hidden layer, model seed 0. Threat model: malicious server that alters the parameters, the same for all
clients; it sees the sum, and knows public images.
"""
    record.write("imprint", "Single images out of a sum, by an imprinted layer", rows, notes)


def sums_of(updates: Updates, clients: int, params: Params) -> dict[str, Updates]:
    """The sum over a leading axis of clients, in floats and through SecAgg of two widths."""
    seen = {"floats": jax.tree.map(lambda leaf: leaf.sum(0), updates)}
    for width in (24, 16):
        protocol = make_protocol("secagg", clients, clip=IMPRINT_CLIP, bits=width)
        assert not any(protocol.quantizer.clipped(leaf) for leaf in jax.tree.leaves(updates))
        observation = observe(aggregate(KEYS[0], protocol, updates), "aggregate", params)
        assert isinstance(observation, Observation)
        seen[f"SecAgg, {width} bits"] = observation.update
    return seen


def recovered(images: data.ImageData, part: slice, bins: limits.Bins) -> np.ndarray:
    """Of each of these images, whether any bin holds a copy."""
    truth = images.images[part]
    guesses = np.clip(images.denormalize(np.asarray(bins.inputs[bins.occupied]).reshape(-1, *truth.shape[1:])), 0, 1)
    errors = cdist(truth.reshape(len(truth), -1), guesses.reshape(len(guesses), -1), "sqeuclidean")
    return errors.min(1) / truth[0].size < RECOVERED


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--victims", type=int, default=16, help="of `sums` and `bits`")
    parser.add_argument("--views", type=int, default=64, help="victims of `views`")
    parser.add_argument("--steps", type=int, default=1_200)
    with tempfile.TemporaryDirectory() as folder:
        # An attack's program is the same for all that it is run on.
        jax.config.update("jax_compilation_cache_dir", folder)
        run_parts(parser, sums, bits, views, imprint)


if __name__ == "__main__":
    main()
