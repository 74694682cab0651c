"""What rank 0 tells the other ranks to do, as bytes (msgpack; rollouts in their wire encoding, nothing pickled)."""

from __future__ import annotations

import msgspec

from cluster.errors import CodecError


class MakeExperience(msgspec.Struct, frozen=True, tag=True):
    """Rollouts → the experience that the next Update trains on."""

    rollouts: list[bytes]
    scores_f32: bytes
    """Normalised, one a rollout."""
    beta: float


class Update(msgspec.Struct, frozen=True, tag=True):
    step: int
    lr_scale: float


class GatherWeights(msgspec.Struct, frozen=True, tag=True):
    """Lend the shards of every weight, in order."""


class ProbeLogprobs(msgspec.Struct, frozen=True, tag=True):
    token_ids_i32: bytes


class SaveModel(msgspec.Struct, frozen=True, tag=True):
    directory: str


class Save(msgspec.Struct, frozen=True, tag=True):
    directory: str


class Load(msgspec.Struct, frozen=True, tag=True):
    directory: str


class Ready(msgspec.Struct, frozen=True, tag=True):
    """Everything is loaded: the run stands here."""

    step: int
    version: int


class End(msgspec.Struct, frozen=True, tag=True):
    """The last order."""

    ending: str


Order = MakeExperience | Update | GatherWeights | ProbeLogprobs | SaveModel | Save | Load | Ready | End

_ENCODER = msgspec.msgpack.Encoder()
_DECODER: msgspec.msgpack.Decoder[Order] = msgspec.msgpack.Decoder(Order)


def encode_order(order: Order) -> bytes:
    """Order → bytes."""
    return _ENCODER.encode(order)


def decode_order(payload: bytes) -> Order:
    """Inverse of encode_order. Raises CodecError."""
    try:
        return _DECODER.decode(payload)
    except msgspec.DecodeError as error:
        raise CodecError(
            "not an order of the learner's first rank", got=str(error), do="run one Keel version on every node"
        ) from error
