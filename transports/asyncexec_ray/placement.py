"""The placement group and the actors in it, in the order of their ranks."""

import asyncio
import importlib
import logging
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import msgspec

from asyncexec.errors import ConfigError
from asyncexec_ray.actor import GROUPS, actor_class
from asyncexec_ray.messages import Place
from asyncexec_ray.options import RayOptions
from asyncexec_ray.refs import answer, finish

logger = logging.getLogger("asyncexec")


class PlacedActor(NamedTuple):
    """An actor, and where it is."""

    actor: Any
    place: Place


@dataclass(slots=True)
class Placement:
    """What an executor has on the cluster.

    Attributes:
        group: the placement group.
        owned: whether it goes with the executor.
        actors: every actor that was created, placed or not.
        driver_node: Ray's id of the driver's node.
    """

    group: Any = None
    owned: bool = False
    actors: list[Any] = field(default_factory=list)
    driver_node: str = ""

    async def fill(self, options: RayOptions, ranks: int, first_bundle: int = 0) -> list[PlacedActor]:
        """Reserve what the ranks need and create them; returns them in the order of their ranks.

        Waits for as long as the cluster has no room, and says so when it is cancelled then.

        Raises:
            ConfigError: a group that cannot hold the ranks, or an actor that cannot be created.
        """
        ray: Any = importlib.import_module("ray")
        self.driver_node = ray.get_runtime_context().get_node_id()
        needs = await finish(asyncio.to_thread(self._reserve, options, ranks, first_bundle))
        try:
            await answer(self.group.ready())
            await finish(asyncio.to_thread(self._create, options, needs, first_bundle if not self.owned else 0))
            places = await asyncio.gather(*(_place(actor) for actor in self.actors))
        except asyncio.CancelledError:
            logger.warning("%d ranks with %s each: the cluster has had no room so far", ranks, needs[0])
            raise
        except ray.exceptions.RayError as error:
            raise ConfigError(f"the ranks' actors cannot be created: {error}") from error
        return sort_places(list(map(PlacedActor, self.actors, places)), self.driver_node)

    def remove(self) -> None:
        """Give back what was reserved; blocks for a moment."""
        if self.owned:
            self.owned = False
            importlib.import_module("ray.util").remove_placement_group(self.group)

    def _reserve(self, options: RayOptions, ranks: int, first_bundle: int) -> list[Mapping[str, float]]:
        """Have a placement group; returns what each rank takes of its bundle."""
        held = options.placement_group
        if held is None:
            needs = _needs(options, _gpus_for_each(ranks))
            placement_group = importlib.import_module("ray.util").placement_group
            bundle = {name: amount for name, amount in needs.items() if amount}
            if not bundle:
                raise ConfigError("options.ray: a rank that needs nothing cannot be placed; valid: num_cpus above 0")
            self.group, self.owned = placement_group([bundle] * ranks, strategy=options.strategy), True
            return [needs] * ranks
        bundles = getattr(held, "bundle_specs", None)
        if bundles is None:
            raise ConfigError(f"options.ray.placement_group is {held!r}; valid: a placement group of Ray")
        end = first_bundle + ranks
        if len(bundles) < end:
            raise ConfigError(
                f"options.ray.placement_group has {len(bundles)} bundles for {end} ranks; each rank needs one"
            )
        self.group = held
        return [_needs(options, bundle.get("GPU", 0), bundle) for bundle in bundles[first_bundle:end]]

    def _create(self, options: RayOptions, needs: Sequence[Mapping[str, float]], first_bundle: int) -> None:
        ray: Any = importlib.import_module("ray")
        strategies: Any = importlib.import_module("ray.util.scheduling_strategies")
        remote = ray.remote(max_restarts=0, max_task_retries=0, concurrency_groups=GROUPS)(actor_class())
        for index, need in enumerate(needs, start=first_bundle):
            further = {name: amount for name, amount in need.items() if name not in ("CPU", "GPU", "memory")}
            placed = remote.options(
                num_cpus=need.get("CPU", 0),
                num_gpus=need.get("GPU", 0),
                memory=need.get("memory"),
                resources=further,
                runtime_env=options.runtime_env or None,
                scheduling_strategy=strategies.PlacementGroupSchedulingStrategy(self.group, index),
            )
            self.actors.append(placed.remote([str(path) for path in sys.path]))


def sort_places(actors: Sequence[PlacedActor], driver_node: str) -> list[PlacedActor]:
    """The driver's host first, then host by host; on each, by the number of the first GPU."""

    def order(placed: PlacedActor) -> tuple[Any, ...]:
        place = placed.place
        gpus = sorted((len(gpu), gpu) for gpu in place.gpus)
        return place.node != driver_node, place.host, place.node, gpus

    return sorted(actors, key=order)


def local_ranks(places: Sequence[Place]) -> list[int]:
    """Each rank's number among those of its host."""
    return [sum(earlier.node == place.node for earlier in places[:rank]) for rank, place in enumerate(places)]


async def _place(actor: Any) -> Place:
    return msgspec.msgpack.decode(await answer(actor.place.remote()), type=Place)


def _gpus_for_each(ranks: int) -> float:
    total: float = importlib.import_module("ray").cluster_resources().get("GPU", 0)
    return 1 if total >= ranks else 0


def _needs(options: RayOptions, gpus: float, bundle: Mapping[str, float] | None = None) -> dict[str, float]:
    """What one rank takes: what the options say, else all of a bundle, else one CPU and as many GPUs."""
    needs = {"CPU": 1.0} if bundle is None else dict(bundle)
    needs["GPU"] = gpus
    if options.num_cpus is not None:
        needs["CPU"] = options.num_cpus
    if options.num_gpus is not None:
        needs["GPU"] = options.num_gpus
    return needs | options.resources
