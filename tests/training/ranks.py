"""Run a function on two gloo ranks of this machine."""

import socket

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def _rank(rank: int, world: int, port: int, function, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)
    try:
        torch.save(function(rank), f"{folder}/rank{rank}.pt")
    finally:
        dist.destroy_process_group()


def on_two_ranks(function, folder) -> list:
    """``[function(0), function(1)]``; the function must be importable (module level)."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.start_processes(_rank, (2, port, function, str(folder)), nprocs=2, start_method="spawn")
    return [torch.load(f"{folder}/rank{rank}.pt", weights_only=False) for rank in range(2)]
