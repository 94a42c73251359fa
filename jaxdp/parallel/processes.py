"""The processes of a run, which `jax.distributed` connects; which of them this is."""

import hashlib
import os
from pathlib import Path
from typing import Any

import jax
import jaxlib
from jax._src import distributed  # Its client has no public name; Orbax uses it, too.

import jaxdp
from jaxdp.common import nvidia
from jaxdp.common.errors import RunError
from jaxdp.common.files import first_line
from jaxdp.parallel import rendezvous
from jaxdp.parallel.identity import Identity, host_and_port
from jaxdp.parallel.links import Links

PROXIES = {"grpc_proxy", "https_proxy", "http_proxy"}  # What gRPC reads.


def connect(identity: Identity | None) -> Links:
    """Connects the processes of a run by `jax.distributed`; without others does nothing.

    Args:
      identity: which of them this is; None if it runs alone.

    Returns:
      What shows that one of them has ended, for `failures.shared`.

    Raises:
      ConfigError: the processes don't go together, or the address can't be used.
      RunError: some process doesn't come, or they can't be connected.
    """
    if identity is None:
        return Links({})
    links = rendezvous.meet(identity, _facts())
    if os.environ.keys() & PROXIES:  # gRPC would look for process 0 at the proxy.
        host, _ = host_and_port(identity.address, identity.where)
        os.environ.update(no_grpc_proxy=host)
    # JAX would catch SIGTERM itself, in place of common/stopping.py.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(
            identity.address,
            identity.count,
            identity.id,
            identity.local_device_ids,
            cluster_detection_method="deactivate",
        )
    except (RuntimeError, ValueError) as error:
        raise RunError(
            f"jax.distributed could not join the processes ({first_line(error)}): check that "
            f"every process can reach process 0 at {identity.where}"
        ) from error
    return links


def _facts() -> dict[str, str]:
    """Returns what has to be equal in all processes before JAX looks for devices."""
    sources, hashed = Path(jaxdp.__file__).parent, hashlib.sha256()
    for path in sorted(sources.rglob("*.py")):
        hashed.update(path.read_bytes())
    return {
        "the version of jaxdp": f"{jaxdp.__version__} ({hashed.hexdigest()[:8]})",
        "the version of jax": jax.__version__,
        "the version of jaxlib": jaxlib.__version__,
        "the kind of devices (JAX_PLATFORMS)": _platform(),
    }


def _platform() -> str:
    """Returns the kind of devices that JAX will look for, without looking."""
    first = (jax.config.values["jax_platforms"] or "").split(",")[0]
    if not first:
        first = "cuda" if nvidia.device_files() else "cpu"
    return "cuda" if first == "gpu" else first


def number() -> int:
    """Returns the number of this process, 0 until it is connected; doesn't start JAX's devices."""
    return distributed.global_state.process_id


def is_main() -> bool:
    """Returns whether this is process 0, the one that writes logs."""
    return jax.process_index() == 0


def client() -> Any:
    """Returns JAX's client of the key-value store in process 0; None if this process is alone."""
    return distributed.global_state.client
