"""Reads what mirrors write, by the formats and not by the writers' own code."""

import json
import struct


def read_tensorboard(folder):
    """(name, step) -> value of every scalar, from the records of the event files."""
    return {key: value for key, (value, _) in read_tensorboard_times(folder).items()}


def read_tensorboard_times(folder):
    """(name, step) -> value and Unix time of every scalar."""
    from tensorboardX.proto import event_pb2

    values = {}
    for path in sorted(folder.iterdir()):
        data, place = path.read_bytes(), 0
        while place < len(data):
            (length,) = struct.unpack_from("<Q", data, place)
            event = event_pb2.Event()
            event.ParseFromString(data[place + 12 : place + 12 + length])
            values |= {(value.tag, event.step): (value.simple_value, event.wall_time) for value in event.summary.value}
            place += 12 + length + 4
    return values


def read_wandb(folder):
    """The records of a W&B run's file: LevelDB's log format, in blocks of 32 KiB, behind 7 bytes of its own."""
    from wandb.proto import wandb_internal_pb2

    (path,) = folder.rglob("*.wandb")
    data, place, record = path.read_bytes(), 7, b""
    while place < len(data):
        room = 32768 - place % 32768
        if room < 7:
            place += room
            continue
        length, kind = struct.unpack_from("<4xHB", data, place)
        if not kind:
            return
        record += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):
            found = wandb_internal_pb2.Record()
            found.ParseFromString(record)
            yield found
            record = b""


def wandb_points(folder):
    """One dict a point of a W&B run."""
    for record in read_wandb(folder):
        if record.WhichOneof("record_type") == "history":
            yield {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
