package raft

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"time"
)

// An entry is encoded once, when it is proposed; the same bytes go to the
// log in memory, to disk and to every follower (docs/FORMAT.md, "Entry").
//
//	 0       4       8              16              24              32      36
//	+-------+-------+---------------+---------------+---------------+-+-----+------
//	| crc   | length| index         | term          | unix nanos    |k|zeros| data
//	+-------+-------+---------------+---------------+---------------+-+-----+------
//
// Integers are little-endian. The checksum is CRC32C over the data followed by
// bytes 4 to 36 of the header, in that order, so that the expensive part can be
// computed by the proposer before index, term and time are known.
const entryHeaderBytes = 36

type entryKind byte

const (
	entryCommand       entryKind = 1 // given to StateMachine.Apply
	entryNoop          entryKind = 2 // a leader's first entry of its term (§8)
	entryConfiguration entryKind = 3 // a membership (thesis 4)
)

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// EntryID names one entry: no two different entries share both parts (§5.3,
// the Log Matching Property).
type EntryID struct {
	Index Index
	Term  Term
}

func (id EntryID) String() string { return fmt.Sprintf("%d (term %d)", id.Index, id.Term) }

// Entries is a run of consecutive encoded entries. It is immutable and may be
// shared between goroutines. The zero value is an empty run.
type Entries struct {
	first Index
	offs  []uint32 // where each entry begins in buf
	end   uint32   // where the last one ends
	buf   []byte
}

// First returns the index of the first entry; it is meaningless for an empty run.
func (e Entries) First() Index { return e.first }

// Last returns the index of the last entry, First()-1 for an empty run.
func (e Entries) Last() Index { return e.first + Index(len(e.offs)) - 1 }

// Len returns the number of entries.
func (e Entries) Len() int { return len(e.offs) }

// Encoded returns the encoded entries, back to back. The caller must not change them.
func (e Entries) Encoded() []byte {
	if len(e.offs) == 0 {
		return nil
	}
	return e.buf[e.offs[0]:e.end:e.end]
}

func (e Entries) size() int {
	if len(e.offs) == 0 {
		return 0
	}
	return int(e.end - e.offs[0])
}

func (e Entries) offEnd(i int) uint32 {
	if i+1 < len(e.offs) {
		return e.offs[i+1]
	}
	return e.end
}

func (e Entries) raw(i int) []byte     { return e.buf[e.offs[i]:e.offEnd(i)] }
func (e Entries) kind(i int) entryKind { return entryKind(e.buf[e.offs[i]+32]) }
func (e Entries) term(i int) Term      { return Term(binary.LittleEndian.Uint64(e.buf[e.offs[i]+16:])) }
func (e Entries) data(i int) []byte {
	end := e.offEnd(i)
	return e.buf[e.offs[i]+entryHeaderBytes : end : end]
}

func (e Entries) entry(i int) Entry {
	h := e.buf[e.offs[i]:]
	return Entry{
		Index: e.first + Index(i),
		Term:  e.term(i),
		Time:  time.Unix(0, int64(binary.LittleEndian.Uint64(h[24:]))).UTC(),
		Data:  e.data(i),
	}
}

// slice returns entries i to j-1, counted from the run's first.
func (e Entries) slice(i, j int) Entries {
	if i >= j {
		return Entries{first: e.first + Index(i)}
	}
	return Entries{first: e.first + Index(i), offs: e.offs[i:j:j], end: e.offEnd(j - 1), buf: e.buf}
}

// upTo returns the longest prefix of at most maxBytes encoded bytes, but at
// least one entry.
func (e Entries) upTo(maxBytes int) Entries {
	if e.size() <= maxBytes || e.Len() <= 1 {
		return e
	}
	lo, hi := 1, e.Len() // the prefix of lo entries fits or is the minimum; that of hi does not
	for hi-lo > 1 {
		mid := (lo + hi) / 2
		if int(e.offs[mid]-e.offs[0]) <= maxBytes {
			lo = mid
		} else {
			hi = mid
		}
	}
	return e.slice(0, lo)
}

var errEntryCorrupt = errors.New("raft: entry checksum or header is wrong")

// ParseEntries reads encoded entries and checks each one's checksum, that their
// indexes run without a gap from first, and that terms do not go back. The
// result refers to b. Wherever entries come from outside the process, from a
// disk or a peer, they come through here.
func ParseEntries(first Index, b []byte) (Entries, error) {
	if len(b) == 0 {
		return Entries{first: first}, nil
	}
	if uint64(len(b)) > 1<<31 {
		return Entries{}, fmt.Errorf("raft: a run of entries of %d bytes is over the limit of 2 GiB", len(b))
	}
	e := Entries{first: first, end: uint32(len(b)), buf: b, offs: make([]uint32, 0, countEntries(b))}
	var term Term
	for off := 0; off < len(b); {
		h := b[off:]
		if len(h) < entryHeaderBytes {
			return Entries{}, fmt.Errorf("%w: %d bytes are left where a header of %d should be", errEntryCorrupt, len(h), entryHeaderBytes)
		}
		n := uint64(binary.LittleEndian.Uint32(h[4:]))
		if n > uint64(len(h)-entryHeaderBytes) {
			return Entries{}, fmt.Errorf("%w: entry %d announces %d bytes, %d are there", errEntryCorrupt, e.Last()+1, n, len(h)-entryHeaderBytes)
		}
		h = h[:entryHeaderBytes+n]
		if crc := entryCRC(crc32.Update(0, castagnoli, h[entryHeaderBytes:]), h); crc != binary.LittleEndian.Uint32(h) {
			return Entries{}, fmt.Errorf("%w: entry %d", errEntryCorrupt, e.Last()+1)
		}
		i, t, k := Index(binary.LittleEndian.Uint64(h[8:])), Term(binary.LittleEndian.Uint64(h[16:])), entryKind(h[32])
		if i != e.Last()+1 || t < term || k < entryCommand || k > entryConfiguration {
			return Entries{}, fmt.Errorf("%w: found index %d, term %d, kind %d after index %d, term %d", errEntryCorrupt, i, t, k, e.Last(), term)
		}
		term = t
		e.offs = append(e.offs, uint32(off))
		off += len(h)
	}
	return e, nil
}

// countEntries walks the length fields, so that the offset table is allocated
// once. It trusts nothing: the real checks follow.
func countEntries(b []byte) (n int) {
	for off := uint64(0); off+entryHeaderBytes <= uint64(len(b)); n++ {
		off += entryHeaderBytes + uint64(binary.LittleEndian.Uint32(b[off+4:]))
	}
	return n
}

func entryCRC(dataCRC uint32, header []byte) uint32 {
	return crc32.Update(dataCRC, castagnoli, header[4:entryHeaderBytes])
}

// entryBuilder collects entries whose index, term and time are not known yet.
type entryBuilder struct {
	buf  []byte
	offs []uint32
}

func (b *entryBuilder) add(kind entryKind, data []byte) {
	b.offs = append(b.offs, uint32(len(b.buf)))
	var h [entryHeaderBytes]byte
	binary.LittleEndian.PutUint32(h[0:], crc32.Update(0, castagnoli, data)) // completed by seal
	binary.LittleEndian.PutUint32(h[4:], uint32(len(data)))
	h[32] = byte(kind)
	b.buf = append(b.buf, h[:]...)
	b.buf = append(b.buf, data...)
}

// addUnsealed takes over entries that another node's builder made and that
// were never sealed: a forwarded proposal. Their checksums so far cover the data.
func (b *entryBuilder) addUnsealed(raw []byte) error {
	for off := 0; off < len(raw); {
		h := raw[off:]
		if len(h) < entryHeaderBytes {
			return errEntryCorrupt
		}
		n := uint64(binary.LittleEndian.Uint32(h[4:]))
		if n > uint64(len(h)-entryHeaderBytes) || entryKind(h[32]) != entryCommand {
			return errEntryCorrupt
		}
		if crc32.Update(0, castagnoli, h[entryHeaderBytes:entryHeaderBytes+n]) != binary.LittleEndian.Uint32(h) {
			return errEntryCorrupt
		}
		off += entryHeaderBytes + int(n)
	}
	for off := 0; off < len(raw); {
		n := entryHeaderBytes + int(binary.LittleEndian.Uint32(raw[off+4:]))
		b.offs = append(b.offs, uint32(len(b.buf)))
		b.buf = append(b.buf, raw[off:off+n]...)
		off += n
	}
	return nil
}

// nanoseconds is how times are encoded: since 1970, 0 for no time at all.
func nanoseconds(at time.Time) uint64 {
	if at.IsZero() {
		return 0
	}
	return uint64(at.UnixNano())
}

// seal writes index, term and time into every entry and makes the run
// immutable. The builder must not be used afterwards.
func (b *entryBuilder) seal(first Index, term Term, at time.Time) Entries {
	nanos := nanoseconds(at)
	for i, off := range b.offs {
		h := b.buf[off:]
		binary.LittleEndian.PutUint64(h[8:], uint64(first)+uint64(i))
		binary.LittleEndian.PutUint64(h[16:], uint64(term))
		binary.LittleEndian.PutUint64(h[24:], nanos)
		binary.LittleEndian.PutUint32(h, entryCRC(binary.LittleEndian.Uint32(h), h))
	}
	return Entries{first: first, offs: b.offs, end: uint32(len(b.buf)), buf: b.buf}
}

func makeEntry(kind entryKind, id EntryID, at time.Time, data []byte) Entries {
	b := entryBuilder{buf: make([]byte, 0, entryHeaderBytes+len(data))}
	b.add(kind, data)
	return b.seal(id.Index, id.Term, at)
}

// dataSize returns how long the data of entry i is.
func (b *entryBuilder) dataSize(i int) int {
	return int(binary.LittleEndian.Uint32(b.buf[b.offs[i]+4:]))
}

// end returns where entry i ends in buf.
func (b *entryBuilder) end(i int) int {
	if i+1 < len(b.offs) {
		return int(b.offs[i+1])
	}
	return len(b.buf)
}
