package snap

import (
	"encoding/binary"
	"fmt"
	"hash/crc32"
)

// docs/FORMAT.md, "Snapshots", is the specification of what this file encodes
// and decodes.

const (
	formatVersion = 1
	endMagic      = "snapend\n"
	headSize      = 36
	endSize       = 32
	sumSize       = 4         // of the checksum before the data of a block
	blockSize     = 256 << 10 // data of a block that Create writes, in bytes
	maxBlockSize  = 1 << 20   // that Open accepts
)

// Magic is what every snapshot begins with.
const Magic = "raftsnp\n"

// MaxHeaderBytes is the largest header that Create takes.
const MaxHeaderBytes = 1 << 20

var castagnoli = crc32.MakeTable(crc32.Castagnoli) // never written

func checksum(crc uint32, p []byte) uint32 { return crc32.Update(crc, castagnoli, p) }

// placed begins a checksum with the file and the offset that it is for, so that
// what a disk has put elsewhere, or what belongs to another file, is noticed.
func placed(salt uint64, off int64) uint32 {
	var b [16]byte
	binary.LittleEndian.PutUint64(b[:], salt)
	binary.LittleEndian.PutUint64(b[8:], uint64(off))
	return checksum(0, b[:])
}

// head is the fixed start of a file.
type head struct {
	version   uint32
	salt      uint64
	blockSize uint32 // data of every block but the last, in bytes
	header    uint32 // length of the header, in bytes
	headerCRC uint32
}

func (h *head) encode() []byte {
	b := make([]byte, headSize)
	copy(b, Magic)
	le := binary.LittleEndian
	le.PutUint32(b[12:], h.version)
	le.PutUint64(b[16:], h.salt)
	le.PutUint32(b[24:], h.blockSize)
	le.PutUint32(b[28:], h.header)
	le.PutUint32(b[32:], h.headerCRC)
	le.PutUint32(b[8:], checksum(0, b[12:]))
	return b
}

// decodeHead returns a description of what is wrong, or "". It does not judge
// the version, so that a newer format can be told from damage.
func decodeHead(b []byte) (h head, wrong string) {
	le := binary.LittleEndian
	if string(b[:8]) != Magic {
		return h, fmt.Sprintf("the bytes % x where a snapshot starts", b[:8])
	}
	if got, want := checksum(0, b[12:headSize]), le.Uint32(b[8:]); got != want {
		return h, fmt.Sprintf("a start whose checksum is %08x and says %08x", got, want)
	}
	h.version = le.Uint32(b[12:])
	h.salt = le.Uint64(b[16:])
	h.blockSize = le.Uint32(b[24:])
	h.header = le.Uint32(b[28:])
	h.headerCRC = le.Uint32(b[32:])
	return h, ""
}

// checkHead decodes the start of a file that this version can read.
func checkHead(b []byte, file string) (head, error) {
	h, wrong := decodeHead(b)
	switch {
	case wrong != "":
		return h, &CorruptError{file, 0, wrong}
	case h.version > formatVersion:
		return h, &VersionError{File: file, Found: h.version, Max: formatVersion}
	case h.version == 0 || h.blockSize == 0 || h.blockSize > maxBlockSize || h.header > MaxHeaderBytes:
		return h, &CorruptError{file, 0, fmt.Sprintf("version %d, blocks of %d bytes and a header of %d", h.version, h.blockSize, h.header)}
	}
	return h, nil
}

func checkHeader(h *head, header []byte, file string) error {
	if got := checksum(0, header); got != h.headerCRC {
		return &CorruptError{file, headSize, fmt.Sprintf("a header whose checksum is %08x and should be %08x", got, h.headerCRC)}
	}
	return nil
}

// end is the end block. A file without it was never completed.
type end struct {
	sums   uint32 // checksum of the head's checksum and those of all blocks, in order
	blocks uint64
	size   uint64 // of the payload, in bytes
}

func (e *end) encode(salt uint64, off int64) []byte {
	b := make([]byte, endSize)
	copy(b, endMagic)
	le := binary.LittleEndian
	le.PutUint32(b[12:], e.sums)
	le.PutUint64(b[16:], e.blocks)
	le.PutUint64(b[24:], e.size)
	le.PutUint32(b[8:], checksum(placed(salt, off), b[12:]))
	return b
}

func decodeEnd(b []byte, salt uint64, off int64) (e end, wrong string) {
	le := binary.LittleEndian
	if string(b[:8]) != endMagic {
		return e, fmt.Sprintf("the bytes % x where the end block should be", b[:8])
	}
	if got, want := checksum(placed(salt, off), b[12:endSize]), le.Uint32(b[8:]); got != want {
		return e, fmt.Sprintf("an end block whose checksum is %08x and says %08x", got, want)
	}
	return end{sums: le.Uint32(b[12:]), blocks: le.Uint64(b[16:]), size: le.Uint64(b[24:])}, ""
}

// CorruptError says that a file is no whole snapshot: it was damaged after it
// had been completed, because an incomplete one never gets its name.
type CorruptError struct {
	File   string // path
	Offset int64  // in bytes
	Found  string // what is there, and what should be
}

func (e *CorruptError) Error() string {
	return fmt.Sprintf("snap: %s is corrupt at offset %d: found %s; nothing was changed; use another snapshot, or restore this file from a backup", e.File, e.Offset, e.Found)
}

// VersionError says that a file was written by a newer version of this
// library.
type VersionError struct {
	File       string
	Found, Max uint32 // versions of the format
}

func (e *VersionError) Error() string {
	return fmt.Sprintf("snap: %s has format version %d, and this program reads versions up to %d; nothing was changed; run the newer program", e.File, e.Found, e.Max)
}
