package wal

import (
	"encoding/binary"
	"fmt"
	"hash/crc32"
)

// docs/FORMAT.md is the specification of what this file encodes and decodes.

const (
	blockSize       = 4096
	formatVersion   = 1
	batchHeaderSize = 64
	recordHeadSize  = 16
	segmentMagic    = "raftwal\n"
	batchMagic      = "rbat"
	maxBatchBytes   = 1 << 30 // limit of a batch's body
)

const ( // flags of a batch
	flagSeal  = 1 << iota // holds nothing and proves the batch before it
	flagFinal             // a seal, and reading goes on in the next segment
)

const segmentRecovered = 1 // flag of a segment: it follows the batch it names

var castagnoli = crc32.MakeTable(crc32.Castagnoli) // never written

var zeroBlock [blockSize]byte // never written

func checksum(crc uint32, p []byte) uint32 { return crc32.Update(crc, castagnoli, p) }

// blocks rounds a length up to whole blocks, in bytes.
func blocks(n int64) int64 { return (n + blockSize - 1) / blockSize * blockSize }

// link names a batch for the one that follows it.
type link struct {
	seq uint64 // 0: no batch
	crc uint32
}

// segmentHeader is the first block of a segment.
type segmentHeader struct {
	version   uint32
	recovered bool
	number    uint64
	salt      uint64
	size      int64 // of the file, in bytes
	tag       [16]byte
	follows   link   // if recovered: the last batch before this segment that counts
	followsIn uint64 // and the number of its segment
}

func (h *segmentHeader) encode() []byte {
	b := make([]byte, blockSize)
	copy(b, segmentMagic)
	le := binary.LittleEndian
	le.PutUint32(b[12:], h.version)
	if h.recovered {
		le.PutUint32(b[16:], segmentRecovered)
	}
	le.PutUint64(b[24:], h.number)
	le.PutUint64(b[32:], h.salt)
	le.PutUint64(b[40:], uint64(h.size))
	copy(b[48:64], h.tag[:])
	le.PutUint64(b[64:], h.follows.seq)
	le.PutUint64(b[72:], h.followsIn)
	le.PutUint32(b[80:], h.follows.crc)
	le.PutUint32(b[8:], checksum(0, b[12:]))
	return b
}

// decodeSegmentHeader returns a description of what is wrong, or "". The
// checksum stands at the same place in every version, so that a newer format
// can be told from damage.
func decodeSegmentHeader(b []byte) (h segmentHeader, wrong string) {
	le := binary.LittleEndian
	if string(b[:8]) != segmentMagic {
		return h, fmt.Sprintf("the bytes % x where a segment header starts", b[:8])
	}
	if got, want := checksum(0, b[12:blockSize]), le.Uint32(b[8:]); got != want {
		return h, fmt.Sprintf("a segment header whose checksum is %08x and says %08x", got, want)
	}
	h.version = le.Uint32(b[12:])
	h.recovered = le.Uint32(b[16:])&segmentRecovered != 0
	h.number = le.Uint64(b[24:])
	h.salt = le.Uint64(b[32:])
	h.size = int64(le.Uint64(b[40:]))
	copy(h.tag[:], b[48:64])
	h.follows = link{seq: le.Uint64(b[64:]), crc: le.Uint32(b[80:])}
	h.followsIn = le.Uint64(b[72:])
	return h, ""
}

// batchHeader is the start of a batch. Its checksum covers everything in the
// batch, because it covers the checksums of the record heads, and those hold
// the checksums of the data.
type batchHeader struct {
	version    byte
	flags      byte
	salt       uint64
	seq        uint64
	prev       link
	carried    uint32 // length of the carried records, which come first, in bytes
	records    uint32 // length of the other records, in bytes
	carriedCRC uint32 // of the heads of the carried records
	recordsCRC uint32 // of the heads of the other records
}

func (h *batchHeader) isSeal() bool  { return h.flags&flagSeal != 0 }
func (h *batchHeader) isFinal() bool { return h.flags&flagFinal != 0 }

// space is what the batch takes in the file, in bytes.
func (h *batchHeader) space() int64 {
	return blocks(batchHeaderSize + int64(h.carried) + int64(h.records))
}

// encode writes the header to b for a batch at the given file offset, and
// returns its checksum.
func (h *batchHeader) encode(b []byte, off int64) uint32 {
	le := binary.LittleEndian
	clear(b[:batchHeaderSize])
	copy(b, batchMagic)
	le.PutUint64(b[8:], h.salt)
	le.PutUint64(b[16:], h.seq)
	le.PutUint64(b[24:], h.prev.seq)
	le.PutUint32(b[32:], h.prev.crc)
	b[36], b[37] = h.version, h.flags
	le.PutUint32(b[40:], h.carried)
	le.PutUint32(b[44:], h.records)
	le.PutUint32(b[48:], h.carriedCRC)
	le.PutUint32(b[52:], h.recordsCRC)
	crc := headerChecksum(b, off)
	le.PutUint32(b[4:], crc)
	return crc
}

// headerChecksum covers a batch header and the place it is written to, so that
// a batch that a disk has put elsewhere is not taken for another one.
func headerChecksum(b []byte, off int64) uint32 {
	var place [8]byte
	binary.LittleEndian.PutUint64(place[:], uint64(off))
	return checksum(checksum(0, b[8:batchHeaderSize]), place[:])
}

// decodeBatchHeader reports whether b, read at the given offset of a segment
// with the given salt, starts with a valid batch header.
func decodeBatchHeader(b []byte, off int64, salt uint64) (h batchHeader, crc uint32, ok bool) {
	le := binary.LittleEndian
	if len(b) < batchHeaderSize || string(b[:4]) != batchMagic || le.Uint64(b[8:]) != salt {
		return h, 0, false
	}
	crc = le.Uint32(b[4:])
	if crc != headerChecksum(b, off) {
		return h, 0, false
	}
	h = batchHeader{
		version: b[36], flags: b[37],
		salt: salt, seq: le.Uint64(b[16:]),
		prev:    link{seq: le.Uint64(b[24:]), crc: le.Uint32(b[32:])},
		carried: le.Uint32(b[40:]), records: le.Uint32(b[44:]),
		carriedCRC: le.Uint32(b[48:]), recordsCRC: le.Uint32(b[52:]),
	}
	return h, crc, true
}

// appendRecord encodes a record at the end of b and returns it with the
// checksum of heads, continued.
func appendRecord(b []byte, heads uint32, r *Record, size int) ([]byte, uint32) {
	at := len(b)
	b = append(b, zeroBlock[:recordHeadSize]...)
	b = append(b, r.Data...)
	for _, p := range r.Parts {
		b = append(b, p...)
	}
	head := b[at : at+recordHeadSize]
	le := binary.LittleEndian
	le.PutUint32(head, uint32(size))
	le.PutUint32(head[8:], r.Group)
	head[12] = r.Kind
	le.PutUint32(head[4:], recordChecksum(head, b[at+recordHeadSize:]))
	return b, checksum(heads, head)
}

// recordChecksum covers a record: its head, but for the checksum's own place,
// and its data. A record read alone is checked with it.
func recordChecksum(head, data []byte) uint32 {
	return checksum(checksum(checksum(0, head[:4]), head[8:recordHeadSize]), data)
}

// recordHead is the fixed start of a record.
type recordHead struct {
	size  uint32 // of the data, in bytes
	crc   uint32 // of the record
	group uint32
	kind  byte
}

func decodeRecordHead(b []byte) recordHead {
	le := binary.LittleEndian
	return recordHead{size: le.Uint32(b), crc: le.Uint32(b[4:]), group: le.Uint32(b[8:]), kind: b[12]}
}

// eachRecord calls f for the records in body, which has been checked; at is
// the offset of the record's head in body. It stops at the first error.
func eachRecord(body []byte, f func(at int, r Record) error) error {
	for at := 0; at < len(body); {
		h := decodeRecordHead(body[at:])
		end := at + recordHeadSize + int(h.size)
		r := Record{Kind: h.kind, Group: h.group, Data: body[at+recordHeadSize : end : end]}
		if err := f(at, r); err != nil {
			return err
		}
		at = end
	}
	return nil
}

// checkRecords reports whether body is a whole number of valid records whose
// heads have the given checksum.
func checkRecords(body []byte, heads uint32) bool {
	var crc uint32
	for len(body) > 0 {
		if len(body) < recordHeadSize {
			return false
		}
		h := decodeRecordHead(body)
		if int64(h.size) > int64(len(body)-recordHeadSize) {
			return false
		}
		end := recordHeadSize + int(h.size)
		if recordChecksum(body, body[recordHeadSize:end]) != h.crc {
			return false
		}
		crc = checksum(crc, body[:recordHeadSize])
		body = body[end:]
	}
	return crc == heads
}
