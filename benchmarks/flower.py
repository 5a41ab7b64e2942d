"""A round of Flower with three PyTorch clients, and what its server can see in its own log.

    python benchmarks/flower.py [--steps N] [--restarts R]

The clients are `flwr.client.NumPyClient`s with one photograph each, and Flower's own server drives one round of
federated averaging with them in this process. Its strategy keeps what the clients send, as an honest-but-curious server
may. The attack, iDLG, gets nothing but this log and the learning rate, which the server itself configured. It needs
`pip install ".[demo]" flwr torch`, and takes about a minute of CPU time.
"""

import argparse
import os
import time
from typing import Any

os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")

import flwr
import jax
import jax.numpy as jnp
import numpy as np
import record
import torch
from flax import nnx
from flwr.client import Client, NumPyClient
from flwr.common import FitIns, FitRes, ndarrays_to_parameters, parameters_to_ndarrays
from flwr.server import Server, SimpleClientManager
from flwr.server.client_proxy import ClientProxy
from flwr.server.strategy import FedAvg

from gia_jax import (
    Observation,
    ThreatModel,
    attacks,
    clients,
    data,
    interop,
    keep_best,
    labels,
    metrics,
    models,
    observed,
    restarts,
    run,
)

LEARNING_RATE = 0.1
SIDE, CLASSES = 32, 8
GOOD = 20.0  # dB that a reconstruction must reach
Log = dict[str, list[np.ndarray]]


def make_net() -> torch.nn.Module:
    """The clients' model, a LeNet with sigmoids, which the server has designed and so knows."""
    layers: list[torch.nn.Module] = []
    for features, stride in ((3, 2), (12, 2), (12, 1)):
        layers += [torch.nn.Conv2d(features, 12, 5, stride, 2), torch.nn.Sigmoid()]
    net = torch.nn.Sequential(*layers, torch.nn.Flatten(1), torch.nn.Linear(12 * (SIDE // 4) ** 2, CLASSES))
    for parameter in net.parameters():
        torch.nn.init.uniform_(parameter, -0.5, 0.5)
    return net


class Photographer(NumPyClient):
    """A client with one photograph, which takes one step of SGD on it."""

    def __init__(self, image: np.ndarray, label: int) -> None:
        self.image, self.label = torch.tensor(image).permute(2, 0, 1)[None], torch.tensor([label])

    def fit(self, parameters: list[np.ndarray], config: dict[str, Any]) -> tuple[list[np.ndarray], int, dict[str, Any]]:
        """Trains on the photograph, and returns the parameters and the number of examples."""
        net = make_net()
        net.load_state_dict({name: torch.tensor(array) for name, array in zip(net.state_dict(), parameters)})
        optimizer = torch.optim.SGD(net.parameters(), lr=config["learning_rate"])
        torch.nn.functional.cross_entropy(net(self.image), self.label).backward()
        optimizer.step()
        return [value.numpy() for value in net.state_dict().values()], 1, {}


class InProcess(ClientProxy):
    """Flower's link to a client, without a network between them."""

    def __init__(self, cid: str, client: Client) -> None:
        super().__init__(cid)
        self.client = client

    def fit(self, ins: FitIns, timeout: float | None, group_id: int | None) -> FitRes:
        """Lets the client train."""
        return self.client.fit(ins)

    def get_properties(self, *args: Any) -> Any:
        """Stands for all that this round does not ask for."""
        raise NotImplementedError

    get_parameters = evaluate = reconnect = get_properties


class Curious(FedAvg):
    """Federated averaging that keeps what it is sent."""

    def __init__(self, start: list[np.ndarray], num_clients: int) -> None:
        super().__init__(
            min_fit_clients=num_clients,
            min_available_clients=num_clients,
            fraction_evaluate=0.0,
            initial_parameters=ndarrays_to_parameters(start),
            on_fit_config_fn=lambda server_round: {"learning_rate": LEARNING_RATE},
        )
        self.log: Log = {}

    def aggregate_fit(self, server_round: int, results: list[tuple[ClientProxy, FitRes]], failures: list[Any]) -> Any:
        """Keeps the parameters that each client sent, and averages them."""
        for failure in failures:
            raise failure
        for proxy, result in sorted(results, key=lambda pair: pair[0].cid):
            self.log[proxy.cid] = parameters_to_ndarrays(result.parameters)
        return super().aggregate_fit(server_round, results, failures)


def one_round(photos: list[tuple[np.ndarray, int]]) -> tuple[list[np.ndarray], Log]:
    """Runs one round, and returns the parameters that the server sent and those that came back, by client."""
    torch.manual_seed(0)
    start = [value.numpy() for value in make_net().state_dict().values()]
    manager, strategy = SimpleClientManager(), Curious(start, len(photos))
    for number, (image, label) in enumerate(photos):
        manager.register(InProcess(str(number), Photographer(image, label).to_client()))
    Server(client_manager=manager, strategy=strategy).fit(num_rounds=1, timeout=None)
    return start, strategy.log


def observations(sent: list[np.ndarray], log: Log) -> tuple[Any, Observation]:
    """Reads the server's log: the model's forward pass, and an observation of every client, stacked."""
    module = models.LeNet((SIDE, SIDE, 3), CLASSES, rngs=nnx.Rngs(0))
    apply_fn, like = models.functional(module)
    before = interop.from_torch(sent, like)
    seen = []
    for received in log.values():
        update = interop.pseudo_gradient(before, interop.from_torch(received, like), LEARNING_RATE, local_steps=1)
        seen.append(observed(before, update, inputs_like=jnp.zeros((1, SIDE, SIDE, 3)), apply_fn=apply_fn))
    return apply_fn, jax.tree.map(lambda *leaves: jnp.stack(leaves), *seen)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1_500, help="steps of L-BFGS (1,500)")
    parser.add_argument("--restarts", type=int, default=4, help="starts of the attack, of which the best counts (4)")
    args = parser.parse_args()

    images = data.photos(size=SIDE)
    truth, classes = images.images[:3], images.labels[:3]
    sent, log = one_round([(image, int(label)) for image, label in zip(images.normalize(truth), classes)])

    begun = time.perf_counter()
    apply_fn, seen = observations(sent, log)
    client_fn = clients.federated_sgd(clients.cross_entropy(apply_fn))
    attack = keep_best(attacks.idlg(client_fn, labels.dense("head")))
    solve = restarts(lambda key, one: run(attack, key, one, num_steps=args.steps)[0], args.restarts)
    found = jax.jit(jax.vmap(solve))(jax.random.split(jax.random.key(1), len(log)), seen)
    seconds = time.perf_counter() - begun

    rows, best = [], 0.0
    for number, cid in enumerate(log):
        image = images.denormalize(np.asarray(found.batch.inputs[number]))
        psnr = float(metrics.image_scores(image, truth[int(cid)][None]).psnr[0])
        rows.append(
            {
                "client": cid,
                "class": classes[int(cid)],
                "class that was read": int(found.batch.labels[number, 0]),
                "PSNR, dB": f"{psnr:.1f}",
            }
        )
        best = max(best, psnr)
    record.write(
        "table",
        "A server attacks its own log of one round of Flower",
        rows,
        f"Three clients with one photograph of {SIDE}x{SIDE} each take one step of SGD at {LEARNING_RATE:g} on a LeNet "
        f"with sigmoids and random weights. iDLG, {args.steps:,} steps of L-BFGS, {args.restarts} starts of which the "
        f"lowest loss is kept, seed 1: {seconds:.0f} s for all clients, compiling included.\n\n"
        f"Threat model: {ThreatModel.of(seen).describe()}, and the clients' learning rate.",
        torch=torch.__version__,
        flwr=flwr.__version__,
    )
    if best < GOOD:
        raise SystemExit(f"no client's image was recovered at {GOOD} dB")


if __name__ == "__main__":
    main()
