"""Links between ranks: how fast they are, and how long a collective over them takes."""

from __future__ import annotations

import math
from dataclasses import dataclass

NVLINK = {
    "GB300": (900, 100), "GB200": (900, 50), "B300": (900, 100), "B200": (900, 50), "GH200": (450, 50), "H200": (450, 50),
    "H200 NVL": (450, 50), "H100": (450, 50), "H100 NVL": (300, 50), "H800": (200, 50), "H20": (450, 50), "A100": (300, 25),
    "V100": (150, 6.25), "MI300X": (448, 50), "MI250X": (200, 12.5),
}  # fmt: skip
"""GB/s of a device to others of its node and to other nodes, one direction.

Within: half of the bidirectional bandwidth of NVLink or Infinity Fabric on the vendors' data sheets. Between: the network
cards of the vendors' own systems (DGX GB200, B200 and H100: 400 Gb/s a GPU; DGX B300 and GB300: 800; DGX A100: 200; DGX-1:
four of 100 for eight GPUs; MI300X platforms: 400; of MI250X, one of whose two dies is a
device here: four of 200 for eight).
"""
PCIE = (32.0, 12.5)
"""Of every other device: 16 lanes of PCIe 4.0, and a card of 100 Gb/s for each; an assumption that says itself aloud."""


@dataclass(frozen=True)
class Group:
    """Ranks that exchange with each other: ``size`` of them, as many as ``near`` on a node."""

    size: int
    near: int

    @property
    def nodes(self) -> int:
        """Nodes that they are on."""
        return -(-self.size // self.near)


@dataclass(frozen=True)
class Links:
    """Speeds in bytes a second, and times in seconds.

    Args:
        per_node: Ranks of a node.
        within: Speed of one of them to others of its node, one direction.
        between: Of one to other nodes.
        reached: The part of both that exchanges get; 1 where they were measured.
        hop: Until a message has reached another node.
        step: Until it has reached another rank of the node.
    """

    per_node: int = 8
    within: float = 450e9
    between: float = 50e9
    reached: float = 0.8
    hop: float = 10e-6
    step: float = 2e-6

    @classmethod
    def of_device(cls, device: str, per_node: int) -> Links:
        """Those that a device is sold with."""
        within, between = NVLINK.get(device, PCIE)
        return cls(per_node, 1e9 * within, 1e9 * between)

    def ranks(self, size: int) -> Group:
        """Neighbours in number, so many."""
        return Group(size, min(size, self.per_node))

    def speed(self, group: Group) -> float:
        """Bytes a second that pass through a rank in a ring over a group.

        Rings leave a node through the network cards of the group's ranks there, each with a part of the data, so that these
        cards together or a rank's inner links are the limit.
        """
        outside = math.inf if group.nodes == 1 else self.between * group.near
        inside = math.inf if group.near == 1 else self.within
        return min(outside, inside) * self.reached

    def latency(self, group: Group, kind: str) -> float:
        """Seconds that a collective takes without any data.

        Once round a ring; an all-reduce twice, or up and down a tree (Sanders et al. 2009,
        https://doi.org/10.1016/j.parco.2009.09.001); what goes straight to its receiver takes one hop.
        """
        nodes = group.nodes
        if kind in ("all_to_all", "send"):
            return self.hop if nodes > 1 else self.step
        ring = (group.size - nodes) * self.step + (nodes if nodes > 1 else 0) * self.hop
        tree = math.log2(nodes) * self.hop + (group.near - 1) * self.step
        return 2 * min(ring, tree) if kind == "all_reduce" else ring


@dataclass(frozen=True)
class Exchange:
    """A collective.

    Args:
        axis: What of the mesh it is for: data, tensor, sequence, expert or pipeline.
        kind: all_reduce, all_gather, reduce_scatter, all_to_all or send.
        what: What is exchanged.
        bytes: Of the tensor that ranks have together; of all_to_all and send a rank's own.
        times: In a step.
        pieces: In so many parts each time.
        group: Who takes part.
        during: What is computed meanwhile: "forward", "backward", or nothing, "".
    """

    axis: str
    kind: str
    what: str
    bytes: float
    times: int
    pieces: int
    group: Group
    during: str = ""

    @property
    def sent(self) -> float:
        """Bytes that a rank sends in a step (and receives as many).

        A ring's reduce-scatter and all-gather pass (W - 1) / W of the tensor through every rank, its all-reduce is both
        (Patarasuk and Yuan 2009, https://doi.org/10.1016/j.jpdc.2008.09.002): no algorithm sends less.
        """
        passes = {"all_reduce": 2.0, "send": 1.0}.get(self.kind, 1.0)
        others = 1.0 if self.kind == "send" else (self.group.size - 1) / self.group.size
        return passes * others * self.bytes * self.times

    def seconds(self, links: Links) -> float:
        """Time of a step's exchanges of this kind, if nothing is computed meanwhile."""
        return self.times * self.pieces * links.latency(self.group, self.kind) + self._transfer(links)

    def _transfer(self, links: Links) -> float:
        size, near = self.group.size, self.group.near
        if self.kind == "send":
            speed = links.between if self.group.nodes > 1 else links.within
            return self.sent / (speed * links.reached)
        if self.kind == "all_to_all":
            # To ranks of other nodes through the rank's own card, to those of its node at the same time.
            each = self.bytes * self.times / size / links.reached
            return max((size - near) * each / links.between, (near - 1) * each / links.within)
        return self.sent / links.speed(self.group)
