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
	entryOpenSession   entryKind = 4 // the rest are about client sessions (thesis 6.3)
	entryCloseSession  entryKind = 5
	entryOnce          entryKind = 6 // a command of a session, with its number before it
)

// mayHold tells whether entries of this kind may have n bytes of data.
func (k entryKind) mayHold(n uint64) bool {
	switch k {
	case entryCommand, entryNoop, entryConfiguration:
		return true
	case entryOpenSession:
		return n == openDataBytes
	case entryCloseSession:
		return n == closeDataBytes
	case entryOnce:
		return n > requestHeadBytes
	}
	return false
}

// proposed tells whether any node may propose such an entry; the others are
// the leader's own.
func (k entryKind) proposed() bool { return k == entryCommand || k >= entryOpenSession }

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
func (e Entries) nanos(i int) uint64   { return binary.LittleEndian.Uint64(e.buf[e.offs[i]+24:]) }
func (e Entries) data(i int) []byte {
	end := e.offEnd(i)
	return e.buf[e.offs[i]+entryHeaderBytes : end : end]
}

func (e Entries) entry(i int) Entry {
	return Entry{
		Index: e.first + Index(i),
		Term:  e.term(i),
		Time:  time.Unix(0, int64(e.nanos(i))).UTC(),
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
		if i != e.Last()+1 || t < term || !k.mayHold(n) {
			return Entries{}, fmt.Errorf("%w: found index %d, term %d, kind %d with %d bytes after index %d, term %d", errEntryCorrupt, i, t, k, n, e.Last(), term)
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

// add adds an entry whose data is these pieces, one after the other.
func (b *entryBuilder) add(kind entryKind, data ...[]byte) {
	start := len(b.buf)
	b.offs = append(b.offs, uint32(start))
	var h [entryHeaderBytes]byte
	h[32] = byte(kind)
	b.buf = append(b.buf, h[:]...)
	crc := uint32(0)
	for _, d := range data {
		crc = crc32.Update(crc, castagnoli, d)
		b.buf = append(b.buf, d...)
	}
	binary.LittleEndian.PutUint32(b.buf[start:], crc) // completed by seal
	binary.LittleEndian.PutUint32(b.buf[start+4:], uint32(len(b.buf)-start-entryHeaderBytes))
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
		k := entryKind(h[32])
		if n > uint64(len(h)-entryHeaderBytes) || !k.proposed() || !k.mayHold(n) {
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

// commandSize returns how long the command in entry i is, false if it holds none.
func (b *entryBuilder) commandSize(i int) (int, bool) {
	n := int(binary.LittleEndian.Uint32(b.buf[b.offs[i]+4:]))
	switch entryKind(b.buf[b.offs[i]+32]) {
	case entryCommand:
		return n, true
	case entryOnce:
		return n - requestHeadBytes, true
	}
	return 0, false
}

// end returns where entry i ends in buf.
func (b *entryBuilder) end(i int) int {
	if i+1 < len(b.offs) {
		return int(b.offs[i+1])
	}
	return len(b.buf)
}
