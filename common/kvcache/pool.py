"""The memory of a rank's KV cache, seen as a tensor of pages."""

from __future__ import annotations

import ctypes
import mmap

import torch

from common.kvcache.layout import KvLayout

HUGE_PAGE_BYTES = 2 * 1024 * 1024
TORCH_DTYPE = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class KvPool:
    """Pages `0 .. num_pages - 1` of one layout, in one piece of memory.

    Every index is a page that a sequence may own and a peer may write to; there is no scratch page. Slots of a
    page that hold no token yet are zero (attention clears a page when its first slot is written), so a page
    shows nothing of its former owner, neither to arithmetic nor to a peer.

    Attributes:
        layout: Shape of one page.
        num_pages: Number of pages.
        tensor: `[num_pages, num_layers, planes, num_kv_heads, page_size, head_dim]`, contiguous.
    """

    def __init__(
        self,
        layout: KvLayout,
        num_pages: int,
        *,
        buffer: memoryview | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        """Make a pool over `buffer`, which a transfer backend allocated and which must outlive the pool.

        Without a buffer the pool allocates zeroed memory itself: on CPU 2 MiB aligned, with huge pages where
        the kernel has them.

        Raises:
            ValueError: `buffer` is smaller than `num_pages` pages, or was given for a device other than CPU.
        """
        self.layout = layout
        self.num_pages = num_pages
        device = torch.device(device)
        shape = (num_pages, layout.num_layers, layout.planes, layout.num_kv_heads, layout.page_size, layout.head_dim)
        dtype = TORCH_DTYPE[layout.dtype]
        if buffer is not None and device.type != "cpu":
            raise ValueError(f"a host buffer cannot hold a pool on {device}")
        if device.type != "cpu":
            self.tensor = torch.zeros(shape, dtype=dtype, device=device)
            return
        memory = allocate_host(self.nbytes) if buffer is None else buffer
        if memory.nbytes < self.nbytes:
            raise ValueError(f"a buffer of {memory.nbytes} bytes cannot hold {num_pages} pages of {layout.page_bytes}")
        self.tensor = torch.frombuffer(memory[: self.nbytes], dtype=dtype).view(shape)

    @property
    def nbytes(self) -> int:
        """Bytes of all pages."""
        return self.num_pages * self.layout.page_bytes

    @property
    def address(self) -> int:
        """Address of page 0."""
        return self.tensor.data_ptr()

    def read_page(self, page: int) -> memoryview:
        """The bytes of a page: the pool's own memory on CPU, a copy of a device's. May be called from any thread."""
        return self.tensor[page].reshape(-1).view(torch.uint8).cpu().numpy().data


def allocate_host(nbytes: int) -> memoryview:
    """Zeroed anonymous memory of `nbytes`, 2 MiB aligned and advised to use huge pages. It lives with its views."""
    mapping = mmap.mmap(-1, nbytes + HUGE_PAGE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        mapping.madvise(mmap.MADV_HUGEPAGE)
    start = -ctypes.addressof(ctypes.c_char.from_buffer(mapping)) % HUGE_PAGE_BYTES
    return memoryview(mapping)[start : start + nbytes]
