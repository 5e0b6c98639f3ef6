"""Tickets as they travel."""

from __future__ import annotations

from common.mesh.ticket import Ticket
from pdmesh.v1 import types_pb2


def ticket_from(message: types_pb2.Ticket) -> Ticket:
    return Ticket(message.room_id, message.attempt, message.epoch)


def ticket_to(ticket: Ticket) -> types_pb2.Ticket:
    return types_pb2.Ticket(room_id=ticket.room_id, attempt=ticket.attempt, epoch=ticket.epoch)
