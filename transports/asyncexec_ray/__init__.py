"""The `ray` transport: one Ray actor per rank, stepped through one compiled graph.

    options          the table `options.ray`
    transport        the driver's half: opens, sends, and ends the ranks
    cluster          this process's connection to Ray, shared by its executors
    placement        the placement group and the actors in it, in the order of their ranks
    member           the driver's half of one rank: order of its messages, its late replies, its death
    process          a rank's process where it is on the driver's host
    graph            the compiled graph of the steps: when it is compiled, used and torn down
    documented       driving a graph by what Ray documents
    graph_internals  driving a graph by a reader and a writer of our own; all that touches Ray's internals
    actor            the class of the actors, which brings the driver's import path along
    rank             the rank's half
    refs             awaiting what Ray answers
    messages         what driver and ranks say to each other, as bytes

Ray is imported when an executor starts.
"""

from asyncexec_ray.transport import RayTransport

__all__ = ["RayTransport"]
