"""What a server still inverts behind secure aggregation: sums of more and more clients, and one client's masked update.

    python benchmarks/aggregated.py [PART ...] [--victims N] [--steps N] [--views N]

The parts are `sums`, `bits` and `views`. Needs the extras `demo`, `data` and `secure`, and CIFAR-10 prepared by TFDS
(GIA_JAX_DATA_DIR).
"""

import argparse
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
import record
from parts import run_parts
from scipy import stats

from gia_jax import Observation, ThreatModel
from gia_jax.aggregation import make_protocol
from gia_jax.cases import PRIOR_ONLY, Case, attack, load_case, see
from gia_jax.secure_aggregation.cases import see_aggregated
from gia_jax.secure_aggregation.protocol import decode
from gia_jax.secure_aggregation.quantization import RING

CLIP, BITS = 2.0, 22
SUCCESS = 20.0  # dB
MARGIN = 0.5  # dB, of the equivalence tests
THREAT = ThreatModel(labels=True).describe()
KEYS = jax.random.split(jax.random.key(0))


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
            known_labels=True,
            num_steps=args.steps,
            lanes=8,
            prior_only=name if i == len(observations) - 1 else None,
        )
        found |= {group: outcome.scores.psnr for group, outcome in outcomes.items()}
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


def difference(values: np.ndarray) -> str:
    """Mean of differences paired by victim, with a bootstrap interval of 95 %."""
    found = stats.bootstrap((values,), np.mean, n_resamples=2_000, rng=np.random.default_rng(0)).confidence_interval
    return f"{values.mean():+.3f} [{found.low:+.3f}, {found.high:+.3f}]"


def figures(psnr: np.ndarray) -> dict[str, str]:
    return {"median dB": f"{np.median(psnr):.2f}", f">= {SUCCESS:g} dB": f"{np.mean(psnr >= SUCCESS):.0%}"}


def described(args: argparse.Namespace) -> str:
    return (
        f"Inverting Gradients, {args.steps} steps, 1 start, labels known, untrained LeNet, model and attack seed 0; "
        f"CIFAR-10, the first test images by id, one for each client. SecAgg of {BITS} bits and clip {CLIP:g} unless "
        f"said. PSNR after the best assignment within a victim. Threat model: {THREAT}."
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
                "difference, mean dB": difference(np.mean(psnr["aggregate"] - psnr["unprotected"], 1)),
                "prior only, median dB": f"{np.median(psnr[PRIOR_ONLY]):.2f}",
                "grey, median dB": f"{np.median(10 * np.log10(1 / np.mean((case.pixels - 0.5) ** 2, (2, 3, 4)))):.2f}",
            }
        )
        print(rows[-1], flush=True)
    notes = f"{args.victims} victims of N clients each; 'unprotected' is the mean gradient itself."
    title = "What the sum of N clients gives away"
    record.write("aggregated_sums", title, rows, f"{notes} {described(args)}")


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
            "difference, mean dB": "-" if name == "unprotected" else difference((found - psnr["unprotected"])[:, 0]),
        }
        for name, found in psnr.items()
    ]
    notes = f"{args.victims} victims, each the only client of a run; differences are paired by victim."
    record.write("aggregated_bits", "One client alone in the sum, by bits", rows, f"{notes} {described(args)}")


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
                "difference, mean dB": difference(gap),
                f"p of a difference of {MARGIN:g} dB or more": f"{max(tests):.1e}",
            }
        )
        print(rows[-1], flush=True)
    notes = f"{args.views} victims, the first of {clients} clients each; the larger p of two one-sided paired t-tests."
    record.write("aggregated_views", "An attack on one client's masked update", rows, f"{notes} {described(args)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--victims", type=int, default=16, help="of `sums` and `bits`")
    parser.add_argument("--views", type=int, default=64, help="victims of `views`")
    parser.add_argument("--steps", type=int, default=1_200)
    with tempfile.TemporaryDirectory() as folder:
        # An attack's program is the same for all that it is run on.
        jax.config.update("jax_compilation_cache_dir", folder)
        run_parts(parser, sums, bits, views)


if __name__ == "__main__":
    main()
