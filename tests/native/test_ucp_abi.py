"""What both cores believe of UCX's C interface is what the headers of libucx say."""

from __future__ import annotations

import ctypes
import importlib.util
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from raynixl.native import twin_ucp, ucx

pytestmark = pytest.mark.pure

NATIVE = Path(__file__).parent.parent.parent / "native"

# Ours in C++, ours in ctypes, UCX's; and members: ours in C++, ours in ctypes, UCX's.
STRUCTURES: list[tuple[str, type[ctypes.Structure], str, list[tuple[str, str]]]] = [
    (
        "RequestParam",
        twin_ucp.RequestParam,
        "ucp_request_param_t",
        [
            ("op_attr_mask", "op_attr_mask"),
            ("flags", "flags"),
            ("request", "request"),
            ("send", "cb.send"),
            ("datatype", "datatype"),
            ("user_data", "user_data"),
            ("reply_buffer", "reply_buffer"),
            ("memory_type", "memory_type"),
            ("recv_info", "recv_info"),
            ("memh", "memh"),
        ],
    ),
    (
        "MemMapParams",
        twin_ucp.MemMapParams,
        "ucp_mem_map_params_t",
        [
            (name, name)
            for name in ("field_mask", "address", "length", "flags", "prot", "memory_type", "exported_memh_buffer")
        ],
    ),
    ("SockAddr", twin_ucp.SockAddr, "ucs_sock_addr_t", [("addr", "addr"), ("addrlen", "addrlen")]),
    (
        "EpParams",
        twin_ucp.EpParams,
        "ucp_ep_params_t",
        [
            ("field_mask", "field_mask"),
            ("address", "address"),
            ("err_mode", "err_mode"),
            ("err_callback", "err_handler.cb"),
            ("err_arg", "err_handler.arg"),
            ("user_data", "user_data"),
            ("flags", "flags"),
            ("sockaddr", "sockaddr"),
            ("conn_request", "conn_request"),
            ("name", "name"),
            ("local_sockaddr", "local_sockaddr"),
        ],
    ),
    (
        "TransportEntry",
        twin_ucp.TransportEntry,
        "ucp_transport_entry_t",
        [("transport", "transport_name"), ("device", "device_name")],
    ),
    (
        "Transports",
        twin_ucp.Transports,
        "ucp_transports_t",
        [(name, name) for name in ("entries", "num_entries", "entry_size")],
    ),
    (
        "EpAttr",
        twin_ucp.EpAttr,
        "ucp_ep_attr_t",
        [
            (name, name)
            for name in ("field_mask", "name", "local_sockaddr", "remote_sockaddr", "transports", "user_data")
        ],
    ),
]

# Ours in C++ or '' where it has none, ours in Python or None, UCX's.
CONSTANTS: list[tuple[str, int | None, str]] = [
    ("kOk", twin_ucp.OK, "UCS_OK"),
    ("", twin_ucp.IN_PROGRESS, "UCS_INPROGRESS"),
    ("kNoMemory", twin_ucp.NO_MEMORY, "UCS_ERR_NO_MEMORY"),
    ("kInvalidAddress", twin_ucp.INVALID_ADDRESS, "UCS_ERR_INVALID_ADDR"),
    ("kBusy", None, "UCS_ERR_BUSY"),
    ("kUnsupported", twin_ucp.UNSUPPORTED, "UCS_ERR_UNSUPPORTED"),
    ("kFieldCallback", twin_ucp.FIELD_CALLBACK, "UCP_OP_ATTR_FIELD_CALLBACK"),
    ("kFieldUserData", twin_ucp.FIELD_USER_DATA, "UCP_OP_ATTR_FIELD_USER_DATA"),
    ("kFieldFlags", twin_ucp.FIELD_FLAGS, "UCP_OP_ATTR_FIELD_FLAGS"),
    ("kFieldMemoryType", twin_ucp.FIELD_MEMORY_TYPE, "UCP_OP_ATTR_FIELD_MEMORY_TYPE"),
    ("kFieldMemh", twin_ucp.FIELD_MEMH, "UCP_OP_ATTR_FIELD_MEMH"),
    ("kMultiSend", twin_ucp.MULTI_SEND, "UCP_OP_ATTR_FLAG_MULTI_SEND"),
    ("kCloseForce", twin_ucp.CLOSE_FORCE, "UCP_EP_CLOSE_FLAG_FORCE"),
    ("kMapAddress", twin_ucp.MAP_ADDRESS, "UCP_MEM_MAP_PARAM_FIELD_ADDRESS"),
    ("kMapLength", twin_ucp.MAP_LENGTH, "UCP_MEM_MAP_PARAM_FIELD_LENGTH"),
    ("kMapMemoryType", twin_ucp.MAP_MEMORY_TYPE, "UCP_MEM_MAP_PARAM_FIELD_MEMORY_TYPE"),
    ("kEpAddress", twin_ucp.EP_ADDRESS, "UCP_EP_PARAM_FIELD_REMOTE_ADDRESS"),
    ("kEpErrMode", twin_ucp.EP_ERR_MODE, "UCP_EP_PARAM_FIELD_ERR_HANDLING_MODE"),
    ("kEpErrHandler", twin_ucp.EP_ERR_HANDLER, "UCP_EP_PARAM_FIELD_ERR_HANDLER"),
    ("kErrModePeer", twin_ucp.ERR_MODE_PEER, "UCP_ERR_HANDLING_MODE_PEER"),
    ("kEpAttrTransports", twin_ucp.EP_ATTR_TRANSPORTS, "UCP_EP_ATTR_FIELD_TRANSPORTS"),
    ("kHost", ucx.HOST_MEMORY, "UCS_MEMORY_TYPE_HOST"),
    ("kCuda", ucx.CUDA_MEMORY, "UCS_MEMORY_TYPE_CUDA"),
    ("", twin_ucp.FIRST_ERROR, "uint64_t(UCS_ERR_LAST)"),
]

# Our function types against UCX's, argument by argument where they can be told apart.
FUNCTIONS = r"""
template <typename T> struct Erase { using type = T; };
template <typename T> struct Erase<T*> { using type = void*; };
template <> struct Erase<ucs_status_t> { using type = ucp::Status; };
template <typename R, typename... A> struct Shape {};
template <typename R, typename... A>
Shape<typename Erase<R>::type, typename Erase<A>::type...> shape(R (*)(A...));
template <typename Ours, typename R, typename... A>
constexpr bool is_shaped(R (*)(A...)) {
  return std::is_same_v<Ours, Shape<typename Erase<R>::type, typename Erase<A>::type...>>;
}
#define SAME(member, function) \
  static_assert(std::is_same_v<decltype(shape(ucp::Library{}.member)), decltype(shape(&function))>, #function)
"""


# What our ctypes functions take, in C++; every pointer is one of these two.
TYPES = {
    None: "void",
    ctypes.c_void_p: "void*",
    ctypes.c_char_p: "void*",
    ctypes.c_size_t: "size_t",
    ctypes.c_int8: "ucp::Status",
    ctypes.c_uint: "unsigned",
}


def headers() -> Path:
    """The folder of UCX's headers: that of the libucx wheel."""
    spec = importlib.util.find_spec("libucx")
    folder = Path(next(iter(spec.submodule_search_locations or [""]))) / "include" if spec else Path()
    if not (folder / "ucp/api/ucp.h").exists():
        pytest.skip("there are no headers of libucx")
    return folder


def compiler() -> str:
    """A C++ compiler."""
    found = shutil.which("g++") or shutil.which("c++") or shutil.which("clang++")
    if found is None:
        pytest.skip("there is no C++ compiler")
    return found


def loaded_functions() -> list[tuple[str, str]]:
    """Our members and UCX's names, from where they are looked up in native/ucp_abi.cpp."""
    text = (NATIVE / "ucp_abi.cpp").read_text(encoding="utf-8")
    return [(member, name) for name, member in re.findall(r'find\(\w+, "(\w+)", l\.(\w+)\)', text)]


def assertions() -> list[str]:
    """Lines of C++ that hold if ours is theirs."""
    lines = []
    for ours, twin, theirs, members in STRUCTURES:
        lines.append(f"static_assert(sizeof(ucp::{ours}) == sizeof({theirs}));")
        lines.append(f"static_assert(sizeof({theirs}) == {ctypes.sizeof(twin)});")
        for our, their in members:
            offset = f"offsetof({theirs}, {their})"
            size = f"sizeof((({theirs}*)nullptr)->{their})"
            descriptor = getattr(twin, our)
            lines.append(f"static_assert(offsetof(ucp::{ours}, {our}) == {offset});")
            lines.append(f"static_assert(sizeof(ucp::{ours}::{our}) == {size});")
            lines.append(f"static_assert({offset} == {descriptor.offset} && {size} == {descriptor.size});")
    for ours, value, theirs in CONSTANTS:
        if ours:
            lines.append(f"static_assert(int64_t(ucp::{ours}) == int64_t({theirs}));")
        if value is not None:
            lines.append(f"static_assert(int64_t({value}ull) == int64_t({theirs}));" if value >= 0 else
                         f"static_assert({value} == int64_t({theirs}));")  # fmt: skip
    lines += [f"SAME({member}, {name});" for member, name in loaded_functions()]
    for name, (restype, argtypes) in twin_ucp.SIGNATURES.items():
        shape = ", ".join(TYPES[kind] for kind in (restype, *argtypes))
        lines.append(f'static_assert(is_shaped<Shape<{shape}>>(&{name}), "{name} in ctypes");')
    lines.append("static_assert(sizeof(ucs_status_t) == 1 && sizeof(ucp::Status) == 1);")
    lines.append("static_assert(uintptr_t(-100) == uintptr_t(UCS_ERR_LAST));")
    return lines


def test_our_declarations_match_the_headers_of_ucx(tmp_path: Path) -> None:
    include = headers()
    source = tmp_path / "abi.cpp"
    lines = ["#include <cstddef>", "#include <type_traits>", "#include <ucp/api/ucp.h>", '#include "ucp_abi.h"']
    lines += ["using namespace raynixl;", FUNCTIONS, *assertions()]
    source.write_text("\n".join(lines), encoding="utf-8")
    command = [compiler(), "-std=c++20", "-fsyntax-only", "-Wno-invalid-offsetof", f"-I{include}", f"-I{NATIVE}"]
    said = subprocess.run([*command, str(source)], capture_output=True, text=True, timeout=100, check=False)
    assert said.returncode == 0, said.stderr


def test_every_member_is_compared() -> None:
    for _, twin, _, members in STRUCTURES:
        assert [our for our, _ in members] == [name for name, *_ in twin._fields_]
    text = (NATIVE / "ucp_abi.h").read_text(encoding="utf-8")
    declared = re.findall(r"constexpr \w+ (k\w+) =", text) + re.findall(r"\b(k[A-Z]\w+) = -?\d+", text)
    assert set(declared) == {ours for ours, *_ in CONSTANTS if ours}
    structures = set(re.findall(r"^struct (\w+) \{", text, re.MULTILINE))
    assert structures - {"Library"} == {ours for ours, *_ in STRUCTURES}


def test_both_cores_use_the_same_functions_but_for_a_thread_of_their_own() -> None:
    ours = {name for _, name in loaded_functions()}
    assert ours == set(twin_ucp.SIGNATURES) | {"ucp_worker_arm", "ucp_worker_get_efd"}
