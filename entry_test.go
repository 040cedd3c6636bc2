package raft

import (
	"bytes"
	"encoding/binary"
	"errors"
	"math/rand/v2"
	"testing"
	"time"
)

func sealed(first Index, term Term, data ...string) Entries {
	var b entryBuilder
	for _, d := range data {
		b.add(entryCommand, []byte(d))
	}
	return b.seal(first, term, simEpoch)
}

func TestEntriesRoundTrip(t *testing.T) {
	at := time.Date(2026, 3, 4, 5, 6, 7, 89, time.UTC)
	var b entryBuilder
	b.add(entryCommand, []byte("one"))
	b.add(entryNoop, nil)
	b.add(entryCommand, []byte("three"))
	e := b.seal(7, 3, at)
	p, err := ParseEntries(7, e.Encoded())
	if err != nil {
		t.Fatal(err)
	}
	if p.First() != 7 || p.Last() != 9 || p.Len() != 3 || p.size() != e.size() {
		t.Fatalf("parsed %d to %d, %d bytes, want 7 to 9, %d bytes", p.First(), p.Last(), p.size(), e.size())
	}
	for i, want := range []Entry{{7, 3, at, []byte("one")}, {8, 3, at, nil}, {9, 3, at, []byte("three")}} {
		got := p.entry(i)
		if got.Index != want.Index || got.Term != want.Term || !got.Time.Equal(want.Time) || !bytes.Equal(got.Data, want.Data) {
			t.Errorf("entry %d is %+v, want %+v", i, got, want)
		}
	}
	if p.kind(1) != entryNoop {
		t.Errorf("kind of the second entry is %d", p.kind(1))
	}
}

// Each single flipped bit, each cut and each wrong position is refused.
func TestParseEntriesRefusesDamage(t *testing.T) {
	good := sealed(5, 2, "abc", "", "a longer command").Encoded()
	if _, err := ParseEntries(5, good); err != nil {
		t.Fatal(err)
	}
	for i := range len(good) * 8 {
		bad := bytes.Clone(good)
		bad[i/8] ^= 1 << (i % 8)
		if _, err := ParseEntries(5, bad); !errors.Is(err, errEntryCorrupt) {
			t.Errorf("bit %d of byte %d flipped: %v", i%8, i/8, err)
		}
	}
	boundaries := map[int]bool{0: true, 39: true, 75: true, len(good): true}
	for n := range len(good) + 1 {
		if _, err := ParseEntries(5, good[:n]); (err == nil) != boundaries[n] {
			t.Errorf("cut to %d bytes: %v", n, err)
		}
	}
	if _, err := ParseEntries(6, good); !errors.Is(err, errEntryCorrupt) {
		t.Errorf("read as entries from 6 on: %v", err)
	}
	back := append(sealed(5, 3, "x").Encoded(), sealed(6, 2, "y").Encoded()...)
	if _, err := ParseEntries(5, back); !errors.Is(err, errEntryCorrupt) {
		t.Errorf("a term that goes back: %v", err)
	}
}

// Each kind has the data that it may have, from a disk or a peer as well as
// forwarded, where there are no kinds that only leaders write.
func TestEntryKinds(t *testing.T) {
	for kind := entryKind(0); kind < 9; kind++ {
		for _, n := range []int{0, 1, closeDataBytes - 1, closeDataBytes, requestHeadBytes, requestHeadBytes + 1, openDataBytes, openDataBytes + 1} {
			want := map[entryKind]bool{
				entryCommand: true, entryNoop: true, entryConfiguration: true,
				entryOpenSession: n == openDataBytes, entryCloseSession: n == closeDataBytes, entryOnce: n > requestHeadBytes,
			}[kind]
			if _, err := ParseEntries(1, makeEntry(kind, EntryID{1, 1}, simEpoch, make([]byte, n)).Encoded()); (err == nil) != want {
				t.Errorf("kind %d with %d bytes: %v", kind, n, err)
			}
			var from, to entryBuilder
			from.add(kind, make([]byte, n))
			if err := to.addUnsealed(from.buf); (err == nil) != (want && kind != entryNoop && kind != entryConfiguration) {
				t.Errorf("kind %d with %d bytes, forwarded: %v", kind, n, err)
			}
		}
	}
}

func TestEntriesSliceAndUpTo(t *testing.T) {
	e := sealed(10, 1, "a", "bb", "ccc", "dddd")
	for i := range e.Len() + 1 {
		for j := i; j <= e.Len(); j++ {
			s := e.slice(i, j)
			if s.Len() != j-i || s.First() != 10+Index(i) || s.Last() != 10+Index(j)-1 {
				t.Fatalf("slice %d to %d is %d to %d", i, j, s.First(), s.Last())
			}
			p, err := ParseEntries(s.First(), s.Encoded())
			if err != nil || p.Len() != s.Len() {
				t.Fatalf("slice %d to %d does not parse: %v", i, j, err)
			}
			for limit := range e.size() + 2 {
				u := s.upTo(limit)
				if s.Len() > 0 && u.Len() == 0 || u.Len() > 1 && u.size() > limit {
					t.Fatalf("up to %d bytes of %d entries: %d entries, %d bytes", limit, s.Len(), u.Len(), u.size())
				}
				if u.Len() < s.Len() && s.slice(0, u.Len()+1).size() <= limit {
					t.Fatalf("up to %d bytes of %d entries: only %d, one more would fit", limit, s.Len(), u.Len())
				}
			}
		}
	}
}

// A forwarded proposal is checked before anything of it is taken.
func TestAddUnsealed(t *testing.T) {
	var from entryBuilder
	from.add(entryCommand, []byte("one"))
	from.add(entryCommand, []byte("two"))
	var to entryBuilder
	to.add(entryCommand, []byte("zero"))
	if err := to.addUnsealed(from.buf); err != nil {
		t.Fatal(err)
	}
	e := to.seal(1, 1, simEpoch)
	if p, err := ParseEntries(1, e.Encoded()); err != nil || p.Len() != 3 || string(p.data(2)) != "two" {
		t.Fatalf("%d entries: %v", p.Len(), err)
	}
	for i := range from.buf {
		bad := bytes.Clone(from.buf)
		bad[i] ^= 0x40
		var b entryBuilder
		err := b.addUnsealed(bad)
		// Index, term and time are not set yet, so nothing depends on them.
		header := i
		if i >= 39 {
			header = i - 39
		}
		if unset := header >= 8 && header < 32 || header > 32 && header < 36; (err == nil) != unset {
			t.Errorf("byte %d changed: %v", i, err)
		}
		if err != nil && (len(b.buf) != 0 || len(b.offs) != 0) {
			t.Errorf("byte %d changed: part of a refused proposal was kept", i)
		}
	}
}

func FuzzParseEntries(f *testing.F) {
	f.Add(uint64(1), []byte(nil))
	f.Add(uint64(5), sealed(5, 2, "abc", "").Encoded())
	f.Add(uint64(1), makeEntry(entryNoop, EntryID{1, 1}, simEpoch, nil).Encoded())
	f.Add(uint64(1), bytes.Repeat([]byte{0xff}, 80))
	long := sealed(1, 1, "x").Encoded()
	binary.LittleEndian.PutUint32(long[4:], 1<<31)
	f.Add(uint64(1), long)
	f.Fuzz(func(t *testing.T, first uint64, b []byte) {
		e, err := ParseEntries(Index(first), b)
		if err != nil {
			return
		}
		if !bytes.Equal(e.Encoded(), b) && len(b) > 0 {
			t.Fatalf("parsed %d bytes of %d", e.size(), len(b))
		}
		var term Term
		for i := range e.Len() {
			en := e.entry(i)
			if en.Index != Index(first)+Index(i) || en.Term < term || len(e.raw(i)) != entryHeaderBytes+len(en.Data) {
				t.Fatalf("entry %d of %d: %+v", i, e.Len(), en)
			}
			term = en.Term
		}
	})
}

// naiveLog is raftLog as one would write it without thinking of memory.
type naiveLog struct {
	start EntryID
	terms []Term // of entries start.Index+1 on
}

func (n *naiveLog) last() Index { return n.start.Index + Index(len(n.terms)) }
func (n *naiveLog) term(i Index) (Term, bool) {
	switch {
	case i == n.start.Index:
		return n.start.Term, true
	case i < n.start.Index || i > n.last():
		return 0, false
	}
	return n.terms[i-n.start.Index-1], true
}

func (n *naiveLog) lastAtOrBelow(i Index, t Term) EntryID {
	for i = min(i, n.last()); i > n.start.Index; i-- {
		if have, _ := n.term(i); have <= t {
			return EntryID{i, have}
		}
	}
	return n.start
}

// TestRaftLogModel compares raftLog with naiveLog over random operations.
func TestRaftLogModel(t *testing.T) {
	for seed := range uint64(300) {
		rng := rand.New(rand.NewPCG(seed, 1))
		l, n := newRaftLog(EntryID{}, 0, nil, nil), &naiveLog{}
		term, durable := Term(1), Index(0)
		for range 150 {
			switch rng.IntN(6) {
			case 0, 1, 2: // append, now and then of a higher term, now and then of several
				var b []byte
				first := n.last() + 1
				for k := range 1 + rng.IntN(4) {
					term += Term(rng.IntN(4) / 3)
					b = append(b, makeEntry(entryCommand, EntryID{first + Index(k), term}, simEpoch, make([]byte, rng.IntN(30))).Encoded()...)
					n.terms = append(n.terms, term)
				}
				e, err := ParseEntries(first, b)
				if err != nil {
					t.Fatal(err)
				}
				l.append(e)
			case 3:
				if k := len(n.terms); k > 0 {
					cut := rng.IntN(k)
					n.terms = n.terms[:cut]
					l.truncate(n.last() + 1)
					durable = min(durable, n.last())
				}
			case 4:
				if k := len(n.terms); k > 0 && rng.IntN(3) == 0 {
					i := n.start.Index + 1 + Index(rng.IntN(k))
					at, _ := n.term(i)
					n.terms = n.terms[i-n.start.Index:]
					n.start = EntryID{i, at}
					l.compact(i)
					durable = max(durable, i)
				}
			case 5:
				durable += Index(rng.IntN(int(n.last()-durable) + 1))
				l.evict(rng.IntN(400), durable)
				if l.firstInMemory() > durable+1 {
					t.Fatalf("seed %d: evicted up to %d, durable is %d", seed, l.firstInMemory()-1, durable)
				}
			}
			compareLogs(t, seed, &l, n, rng)
		}
	}
}

func compareLogs(t *testing.T, seed uint64, l *raftLog, n *naiveLog, rng *rand.Rand) {
	t.Helper()
	if err := l.check(); err != nil {
		t.Fatalf("seed %d: %v", seed, err)
	}
	if l.start != n.start || l.last != n.last() {
		t.Fatalf("seed %d: %v to %d, want %v to %d", seed, l.start, l.last, n.start, n.last())
	}
	for i := Index(0); i <= n.last()+2; i++ {
		a, ok := l.term(i)
		b, want := n.term(i)
		if a != b || ok != want {
			t.Fatalf("seed %d: term of %d is %d %v, want %d %v", seed, i, a, ok, b, want)
		}
	}
	i, term := Index(rng.IntN(int(n.last())+3)), Term(rng.IntN(20))
	if a, b := l.lastAtOrBelow(i, term), n.lastAtOrBelow(i, term); a != b {
		t.Fatalf("seed %d: last at or below (%d, %d) is %v, want %v", seed, i, term, a, b)
	}
	lo := n.start.Index + 1 + Index(rng.IntN(len(n.terms)+1))
	hi := min(n.last(), lo+Index(rng.IntN(5)))
	limit := 1 + rng.IntN(200)
	runs, ok := l.from(lo, hi, limit)
	if lo > hi {
		return
	}
	if ok != (lo >= l.firstInMemory()) || ok && len(runs) == 0 {
		t.Fatalf("seed %d: from %d to %d gives %d runs, %v; memory begins at %d", seed, lo, hi, len(runs), ok, l.firstInMemory())
	}
	size := 0
	at := lo
	for _, e := range runs {
		for k := range e.Len() {
			if want, _ := n.term(at); e.First()+Index(k) != at || e.term(k) != want || at > hi {
				t.Fatalf("seed %d: from %d to %d gives entry %d of term %d", seed, lo, hi, e.First()+Index(k), e.term(k))
			}
			at++
		}
		size += e.size()
	}
	if size > limit && at > lo+1 {
		t.Fatalf("seed %d: %d bytes for a limit of %d", seed, size, limit)
	}
}
