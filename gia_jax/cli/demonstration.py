"""What `python -m gia_jax` runs: three attacks on three photographs, undefended and behind five defenses."""

import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import jax
import numpy as np

from gia_jax import ThreatModel, metrics, report
from gia_jax.cli import console, tables
from gia_jax.cli.cases import load_case
from gia_jax.cli.names import ATTACKS
from gia_jax.cli.outcomes import PRIOR_ONLY
from gia_jax.cli.simulated import attack, see
from gia_jax.defenses.protected import parse, promises

# Strengths of the literature, the noise and the clipping in proportion to LeNet.
SHOWN = (
    "none",
    "prune:ratio=0.9",
    "gaussian:scale=0.01",
    "dpsgd:noise_multiplier=0.01,norm=1",
    "mixup:k=4",
    "instahide:k=4",
)
# Steps and starts of each attack.
PLAN = {"dlg": (1_200, 1), "idlg": (1_200, 3), "inverting_gradients": (1_600, 1)}
DRAWN = ("idlg", "inverting_gradients")  # the attacks whose defended clients get a picture
UNDEFENDED, DEFENDED = "reconstructions.png", "defenses_{}.png"


def run(out: Path, seed: int) -> None:
    """Prints the tables and writes results.json and the pictures to a folder.

    Args:
        out: Path of the folder.
        seed: Seed of the model's weights and of the attacks, at least 0.

    Raises:
        OSError: If the folder cannot be written.
    """
    began = time.time()
    out = console.folder(out, [console.RESULTS, UNDEFENDED, *map(DEFENDED.format, DRAWN)])
    case = load_case("lenet", "photos", victims=3, seed=seed)
    parts = {name: parse(name) for name in SHOWN}
    protected = {name: case.protect(chosen) for name, chosen in parts.items()}
    console.banner(case, "lenet", protected["none"])
    print("The client sends the gradient of one photograph. What can the server see?")
    knows = {name: ATTACKS[name].labels == "known" for name in PLAN}
    for known in (False, True):
        names = ", ".join(name for name in PLAN if knows[name] == known)
        print(f"threat model of {names}: {ThreatModel(labels=known).describe()}")
    print()
    key_clients, key_attack = jax.random.split(jax.random.key(seed))
    seen = see(case, protected, key_clients, known=(False, True))
    found = {}
    for name, (steps, restarts) in PLAN.items():
        found[name] = attack(
            case,
            seen[knows[name]],
            protected["none"],
            name,
            key_attack,
            model="lenet",
            known_labels=knows[name],
            num_steps=steps,
            num_restarts=restarts,
            prior_only="none",
            progress_fn=console.progress(name),
            checkpoint=console.states(out),
        )
    guesses = metrics.baselines(case.pixels, case.gallery)
    rows = [tables.row(name, knows[name], outcomes["none"], outcomes[PRIOR_ONLY]) for name, outcomes in found.items()]
    print(tables.table(rows, guesses))
    print(
        "\nPSNR in dB after clipping to [0, 1]: above 20 a photograph is recognisable, above 40 it is a copy.\n"
        "Restarts are chosen by the attacker's own loss. 'prior only' is the same attack on a random update.\n"
        "Seconds are for all the defenses below together.\n\n"
        "The same attacks, which know of no defense, when the client defends itself; median PSNR in dB:\n"
    )
    medians = [[name, *(f"{np.median(o[shown].psnr):.1f}" for shown in SHOWN)] for name, o in found.items()]
    print(report.table(["attack", *SHOWN], medians))
    print()
    for name, chosen in parts.items():
        # The bounds belong beside an epsilon and take their time: only where there is one.
        bounds = case.bounds_of(chosen) if find_spec("dp_accounting") else {}
        for line in promises(chosen, **bounds):
            print(f"{name}: {line}")
    print(
        "\nAn attacker that knows the defense may do better:\n"
        "python -m gia_jax attack --defense prune:ratio=0.9 --adaptive"
    )
    content: dict[str, Any] = {}
    for name, outcomes in found.items():
        steps, restarts = PLAN[name]
        setting = {"attack": name, "model": "lenet", "data": "photos", "seed": seed, "steps": steps}
        for shown in SHOWN:
            content[name if shown == "none" else f"{name}, {shown}"] = report.results(
                outcomes[shown].study,
                outcomes[shown].scores,
                explained=outcomes[shown].explained,
                settings=setting | {"restarts": restarts, "defense": shown},
                threat_model=console.threat(ThreatModel(labels=knows[name]), parts[shown]),
                extra={
                    "prior_only_psnr": outcomes[PRIOR_ONLY].psnr.tolist(),
                    "prior_only_explained": outcomes[PRIOR_ONLY].explained.share.tolist(),
                },
            )
    content["baselines_psnr"] = {name: psnr.tolist() for name, psnr in guesses.items()}
    attacked = [outcomes["none"] for outcomes in found.values()]
    console.write(out, content, attacked, began)
    undefended = {name: outcomes["none"] for name, outcomes in found.items()}
    title = "What the server sees of three photographs"
    console.picture(out / UNDEFENDED, case.pixels, undefended, title, began)
    for name in DRAWN:
        defended = {shown.replace(":", "\n"): found[name][shown] for shown in SHOWN}
        title = f"{name}, when the client defends itself"
        console.picture(out / DEFENDED.format(name), case.pixels, defended, title, began)
    console.forget(out, attacked)
