"""A member of the group `g` with a real mesh, and nothing else: run as a process by the tests.

usage: mesh_member.py ADDRESS...    (CFS_RUN_DIR names the node; the addresses are the node's own)
Writes the port of its mesh to standard output once it has joined. Ends with 0 when it is told that
it was put out, and writes why.
"""

import os
import sys

import msgspec
import trio

from cluster.control import GroupEvent, InstanceGranted
from cluster.control_io import open_session
from cluster.mesh_io import open_mesh


async def main(addresses):
    barred = trio.Event()
    early, meshes = [], []

    async def circuits(_params):
        return {"unreached": meshes[0].unreached()}

    def on_event(name, data):
        if name == "barred":
            print(data["reason"], flush=True)
            barred.set()
        elif name == "group":
            event = msgspec.convert(data, GroupEvent)
            meshes[0].group_event(event) if meshes else early.append(event)

    async with open_session(
        os.environ["CFS_RUN_DIR"], {"dlm.circuits": circuits}, on_event
    ) as session:
        answer = await session.call("instance.register", {"kind": "mount", "title": "/m"})
        me = msgspec.convert(answer, InstanceGranted).instance
        async with open_mesh(me, addresses, group="g") as mesh:
            mesh.start(lambda _event: None)
            meshes.append(mesh)
            for event in early:
                mesh.group_event(event)
            where = {"group": "g", "addresses": addresses, "port": mesh.port}
            await session.call("group.join", where)
            print(mesh.port, flush=True)
            await barred.wait()


if __name__ == "__main__":
    trio.run(main, sys.argv[1:])
