"""Distances between student's and teacher's states of the same responses."""

from tvkd_fast.losses.states.projections import Measure, projected_distances
from tvkd_fast.losses.states.relations import Relation, relational_distances
from tvkd_fast.losses.states.sinkhorn import entropic_transport, sinkhorn_divergence, transport_distances

__all__ = [
    "Measure",
    "Relation",
    "entropic_transport",
    "projected_distances",
    "relational_distances",
    "sinkhorn_divergence",
    "transport_distances",
]
