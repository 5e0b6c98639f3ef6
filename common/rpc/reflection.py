"""Server reflection under both of its names, v1 and v1alpha.

grpcio-reflection serves v1alpha alone. v1 has the same messages under another package, so the same servicer
answers it, and its file descriptor is v1alpha's with the package renamed.
"""

from __future__ import annotations

from collections.abc import Iterable

import grpc
from google.protobuf import descriptor_pb2, descriptor_pool
from grpc_reflection.v1alpha import reflection, reflection_pb2, reflection_pb2_grpc

V1ALPHA, V1 = "grpc.reflection.v1alpha", "grpc.reflection.v1"
V1_FILE = "grpc/reflection/v1/reflection.proto"
SERVICE = "ServerReflection"
NAMES = (f"{V1}.{SERVICE}", f"{V1ALPHA}.{SERVICE}")


def add_reflection(server: grpc.aio.Server, service_names: Iterable[str]) -> None:
    """Serve reflection of `service_names` and of reflection itself."""
    publish_v1_descriptor()
    servicer = reflection.aio.ReflectionServicer((*service_names, *NAMES))  # type: ignore[no-untyped-call]
    reflection_pb2_grpc.add_ServerReflectionServicer_to_server(servicer, server)  # type: ignore[no-untyped-call]
    method = grpc.stream_stream_rpc_method_handler(
        servicer.ServerReflectionInfo,
        request_deserializer=reflection_pb2.ServerReflectionRequest.FromString,
        response_serializer=reflection_pb2.ServerReflectionResponse.SerializeToString,
    )
    handlers = {"ServerReflectionInfo": method}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(f"{V1}.{SERVICE}", handlers),))


def publish_v1_descriptor() -> None:
    """Add `grpc/reflection/v1/reflection.proto` to the default descriptor pool, unless it stands there already."""
    pool = descriptor_pool.Default()
    file = descriptor_pb2.FileDescriptorProto()
    reflection_pb2.DESCRIPTOR.CopyToProto(file)
    rename(file)
    try:
        pool.FindFileByName(file.name)
    except KeyError:
        pool.Add(file)


def rename(file: descriptor_pb2.FileDescriptorProto) -> None:
    """Move a file from v1alpha's package to v1's, with all references inside it."""
    file.name = V1_FILE
    file.package = V1
    for message in file.message_type:
        for field in message.field:
            if field.type_name:
                field.type_name = field.type_name.replace(V1ALPHA, V1)
    for service in file.service:
        for method in service.method:
            method.input_type = method.input_type.replace(V1ALPHA, V1)
            method.output_type = method.output_type.replace(V1ALPHA, V1)
