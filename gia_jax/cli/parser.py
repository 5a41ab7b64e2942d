"""The parser of the command line. Options get their defaults later, in `options.fill`: one that was given where it has
no meaning is refused by its name.
"""

import argparse

import gia_jax
from gia_jax import models
from gia_jax.attacks.cafe import BATCH_SIZE, NUM_RECORDS, NUM_ROUNDS
from gia_jax.attacks.gias import NUM_LATENT_STEPS
from gia_jax.cli.examples import DATA
from gia_jax.cli.names import AGGREGATIONS, ATTACKS, LABEL_RULES, SOLVERS
from gia_jax.defenses.protected import NAMES


def parser() -> argparse.ArgumentParser:
    """Makes the parser of the command line.

    Returns:
        The parser. Without a command, `command` is None.
    """
    made = argparse.ArgumentParser(prog="python -m gia_jax", description=gia_jax.__doc__)
    made.add_argument("--out", default="gia_jax_out", help="folder for results.json and the pictures")
    made.add_argument("--seed", type=int, default=0, help="seed of the model's weights and of the attacks")
    commands = made.add_subparsers(dest="command", metavar="{attack,federation,report,list}")
    commands.add_parser("list", help="names of attacks, models, data and solvers")
    attack = commands.add_parser(
        "attack", help="one attack, on clients that are simulated or on an update that was recorded"
    )
    attack.add_argument("--attack", help=f"{', '.join(ATTACKS)}; default: inverting_gradients")
    _add_attacker(attack)
    _add_client(attack.add_argument_group("the client, simulated or recorded"))
    _add_simulated(attack.add_argument_group("clients that are simulated"))
    _add_recorded(attack.add_argument_group("an update that was recorded"))
    federation = commands.add_parser("federation", help="CAFE on a vertical federation of several rounds")
    _add_federation(federation)
    report = commands.add_parser("report", help="one HTML page about the results in a folder and its subfolders")
    report.add_argument(
        "folder", metavar="FOLDER", help="folder with files results.json that attacks wrote, or with stores of sweeps"
    )
    report.add_argument("--output", metavar="FILE", help="path of the page; default: report.html in FOLDER")
    for command in (attack, federation):
        # The same options after the command; without a default here, those before it are kept.
        command.add_argument("--seed", type=int, default=argparse.SUPPRESS, help="as before the command")
        command.add_argument("--out", default=argparse.SUPPRESS, help="as before the command")
    return made


def _add_attacker(made: argparse.ArgumentParser) -> None:
    """Adds the options of the attacker."""
    made.add_argument("--steps", type=int, help="steps of each restart; default: the paper's")
    made.add_argument("--restarts", type=int, help="starts of each attack; the lowest loss is kept; default: 1")
    made.add_argument(
        "--labels", choices=["known", "inferred"], help="default: as in the attack's paper, with --update inferred"
    )
    made.add_argument(
        "--label-rule",
        metavar="NAME",
        help=f"rule that infers the labels: {', '.join(LABEL_RULES)}; default: its own; at an unknown scale of the "
        "update take idlg, column_minimum, greedy_bias or llg",
    )
    made.add_argument(
        "--statistics",
        choices=["none", "running", "exact"],
        help="statistics of batch normalisation that grad_inversion matches: the running ones of the model, which say "
        "nothing of data before training, or the exact ones of the client's batch, granted; default: exact, with "
        "--update none",
    )
    made.add_argument(
        "--generator",
        metavar="FILE",
        help="trained generator of gias, of models.save_decoder or benchmarks/generators.py; default: an untrained one",
    )
    made.add_argument(
        "--latent-steps",
        type=int,
        help=f"steps of gias before --steps; default: {NUM_LATENT_STEPS}, or 0 where the generator is untrained",
    )
    made.add_argument("--solver", help=f"{', '.join(SOLVERS)}; default: paper")
    made.add_argument("--lanes", type=int, help="restarts under one vmap; default: 16")
    made.add_argument(
        "--adaptive", action="store_true", default=None, help="the attacker knows the defenses, but not their keys"
    )
    made.add_argument(
        "--no-prior-only", action="store_true", default=None, help="leave out the same attack on random updates"
    )
    made.add_argument(
        "--diagnose",
        action="store_true",
        default=None,
        help="say before the attack what was done to the first victim's update, as far as it shows, and which attacks "
        "can work on it",
    )


def _add_client(made: argparse._ArgumentGroup) -> None:
    """Adds the options of a client of either kind."""
    made.add_argument(
        "--model",
        help=f"{', '.join((*models.MODELS, *models.GRAPH_MODELS))}; default: lenet, or one that suits the attack or "
        "--data. With --update also MODULE:FUNCTION, a function (params, inputs) -> logits of a module in the current "
        "directory or on sys.path; params are nested dicts, by the dots in the names of --params, and a batch of "
        "images is (b, h, w, c)",
    )
    made.add_argument("--batch-size", type=int, help="examples of a client; default: 1")
    made.add_argument("--local-steps", type=int, help="local SGD steps of the client on its whole batch; default: 1")
    made.add_argument(
        "--local-learning-rate",
        type=float,
        help="learning rate of the local steps, which the attacker knows; default: 0.01",
    )
    made.add_argument(
        "--defense",
        action="append",
        metavar="NAME[:k=v,k=v]",
        help=f"a defense of the client; repeat it for several, in their order: {', '.join(NAMES)}. With --update it is "
        "one that the attacker knows of, and needs --adaptive",
    )


def _add_simulated(made: argparse._ArgumentGroup) -> None:
    """Adds the options of clients that are simulated."""
    made.add_argument("--data", help=f"{DATA}; default: photos")
    made.add_argument("--image-size", type=int, help="height and width of photos in pixels; default: 32")
    made.add_argument("--victims", type=int, help="clients attacked, in the order of the data's ids; default: 3")
    made.add_argument(
        "--aggregation", help=f"the protocol by which --clients add up their updates: {', '.join(AGGREGATIONS)}"
    )
    made.add_argument("--clients", type=int, help="clients that aggregate, with --batch-size images each; default: 4")
    made.add_argument("--clip", type=float, help="largest entry of an update that aggregation keeps; default: 2")


def _add_recorded(made: argparse._ArgumentGroup) -> None:
    """Adds the options of an update that was recorded."""
    made.add_argument(
        "--update",
        metavar="FILE",
        help=".npz or .safetensors with the client's update by the names of its tensors, PyTorch's or the model's own, "
        "or in Flower's order. It has the sign and scale of a gradient: it is one, or the old minus the new parameters "
        "divided by the learning rate and the number of local steps, as interop.pseudo_gradient makes it",
    )
    made.add_argument("--params", metavar="FILE", help="the parameters that the server sent, in a file of either kind")
    made.add_argument(
        "--input-shape",
        metavar="H,W,C",
        help="shape of one example as the model sees it: of an image such as 32,32,3, or of any other array such as 14",
    )
    made.add_argument("--classes", type=int, help="number of classes; default: as the last layer of --params tells")
    made.add_argument(
        "--head",
        metavar="PATH",
        help="last layer of MODULE:FUNCTION, with dots between the keys, which label rules read; default: head",
    )
    made.add_argument(
        "--mean", metavar="X[,X]", help="what the client subtracts from pixels in [0, 1], one number or one per channel"
    )
    made.add_argument(
        "--std", metavar="X[,X]", help="what it divides them by then. --mean 0 --std 1 says that the model sees pixels"
    )
    made.add_argument(
        "--batch-norm",
        choices=["evaluation", "training"],
        help="whether the client normalised by the running statistics, which --params must hold, or by those of its "
        "own batch; default: evaluation",
    )
    made.add_argument(
        "--truth",
        metavar="FILE",
        help=".npz or .safetensors with `labels` of the batch, for --labels known, and with `inputs` as the model sees "
        "them for scores, which no attack sees. Those of images (b, h, w, c) are pixels in [0, 1] once --mean and "
        "--std are undone",
    )


def _add_federation(made: argparse.ArgumentParser) -> None:
    """Adds the options of the vertical federation."""
    made.add_argument("--data", help="photos, digits, or a prepared TFDS set of images; default: mnist")
    made.add_argument("--records", type=int, help=f"records of the federation; default: {NUM_RECORDS}")
    made.add_argument("--rounds", type=int, help=f"rounds of the federation; default: {NUM_ROUNDS}")
    made.add_argument("--batch-size", type=int, help=f"records of a round; default: {BATCH_SIZE}")
