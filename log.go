package raft

import "sort"

// raftLog is the log as the core sees it (Figure 2, log[]): the terms of all
// entries, and the newest entries themselves, in encoded immutable runs. Older
// entries are on disk only; reading them is an effect, performed elsewhere.
//
// Because a log holds few different terms, the term of every entry is kept as
// runs: the consistency check of §5.3 and the search for a conflict never need
// the disk.
type raftLog struct {
	start       EntryID   // the log begins after this entry; (0, 0) before anything was compacted
	last        Index     // index of the newest entry, start.Index if there is none
	runs        []EntryID // first entry of each run of equal terms, ascending
	tail        []Entries // the newest entries without a gap up to last
	tailBytes   int
	truncations uint64 // counts conflicts resolved; an asynchronous read compares it

	saved      Index   // entries up to here were handed to storage
	savedStart EntryID // and this start
}

// saveBytes is what a run of entries takes in a save.
func saveBytes(e Entries) int64 { return int64(e.size()) + saveOverhead }

const (
	saveOverhead = 16      // the head of a record
	noLimit      = 1 << 62 // of bytes of saves
)

func newRaftLog(start EntryID, last Index, runs []EntryID, tail []Entries) raftLog {
	l := raftLog{start: start, last: last, runs: runs, tail: tail, saved: last, savedStart: start}
	for _, e := range tail {
		l.tailBytes += e.size()
	}
	return l
}

// term returns the term of entry i; false if i is before the start or after the end.
func (l *raftLog) term(i Index) (Term, bool) {
	if i == l.start.Index {
		return l.start.Term, true
	}
	if i < l.start.Index || i > l.last {
		return 0, false
	}
	return l.runs[l.runOf(i)].Term, true
}

func (l *raftLog) lastID() EntryID {
	t, _ := l.term(l.last)
	return EntryID{l.last, t}
}

func (l *raftLog) matches(id EntryID) bool {
	t, ok := l.term(id.Index)
	return ok && t == id.Term
}

// runOf returns the position of the run that holds entry i. Most questions are
// about the newest one.
func (l *raftLog) runOf(i Index) int {
	n := len(l.runs)
	if n > 0 && l.runs[n-1].Index <= i {
		return n - 1
	}
	return sort.Search(n, func(k int) bool { return l.runs[k].Index > i }) - 1
}

// lastAtOrBelow returns the newest entry with an index of at most i and a term
// of at most t: where two logs that disagree at i may agree (§5.3, the
// optimization of backing up by terms). It never goes below the log's start.
func (l *raftLog) lastAtOrBelow(i Index, t Term) EntryID {
	if i > l.last {
		i = l.last
	}
	for i > l.start.Index {
		k := l.runOf(i)
		if l.runs[k].Term <= t {
			return EntryID{i, l.runs[k].Term}
		}
		i = l.runs[k].Index - 1
	}
	return l.start
}

// append adds entries that begin right after the last one.
func (l *raftLog) append(e Entries) {
	if e.Len() == 0 {
		return
	}
	if e.first != l.last+1 {
		panic(invariantError("append at %d to a log that ends at %d", e.first, l.last))
	}
	// Terms do not go back within a run, so equal ends mean one term.
	first, last := e.term(0), e.term(e.Len()-1)
	for i := 0; i < e.Len(); i++ {
		if t := e.term(i); len(l.runs) == 0 || l.runs[len(l.runs)-1].Term != t {
			l.runs = append(l.runs, EntryID{e.first + Index(i), t})
		}
		if i == 0 && first == last {
			break
		}
	}
	l.tail = append(l.tail, e)
	l.tailBytes += e.size()
	l.last = e.Last()
}

// truncate removes entry `from` and everything after it.
func (l *raftLog) truncate(from Index) {
	if from > l.last {
		return
	}
	if from <= l.start.Index {
		panic(invariantError("truncate at %d, but the log starts after %d", from, l.start.Index))
	}
	l.truncations++
	l.last = from - 1
	l.saved = min(l.saved, l.last)
	for n := len(l.runs); n > 0 && l.runs[n-1].Index >= from; n = len(l.runs) {
		l.runs = l.runs[:n-1]
	}
	for n := len(l.tail); n > 0 && l.tail[n-1].Last() >= from; n = len(l.tail) {
		e := l.tail[n-1]
		l.tail = l.tail[:n-1]
		l.tailBytes -= e.size()
		if e.first < from {
			e = e.slice(0, int(from-e.first))
			l.tail = append(l.tail, e)
			l.tailBytes += e.size()
		}
	}
}

// compact forgets entries up to and including id.Index.
func (l *raftLog) compact(i Index) {
	if i <= l.start.Index {
		return
	}
	t, ok := l.term(i)
	if !ok {
		panic(invariantError("compact at %d, beyond the end at %d", i, l.last))
	}
	l.start = EntryID{i, t}
	k := 0
	for k+1 < len(l.runs) && l.runs[k+1].Index <= i+1 {
		k++
	}
	l.runs = append([]EntryID(nil), l.runs[k:]...)
	if l.last == i {
		l.runs = nil
	}
	l.dropTail(i)
}

// replace forgets everything: the log begins after id, of a snapshot.
func (l *raftLog) replace(id EntryID) {
	truncations := l.truncations + 1
	savedStart := l.savedStart
	*l = newRaftLog(id, id.Index, nil, nil)
	l.truncations, l.savedStart = truncations, savedStart
}

// beginAfter makes the log, which begins after an entry of this index, know its term.
func (l *raftLog) beginAfter(id EntryID) { l.start = id }

// evict drops the oldest runs from memory while at least limit bytes stay, but
// not the newest run, which tells the time of the last entry, and no entry above
// upTo: what is not durable can't be read from disk yet.
func (l *raftLog) evict(limit int, upTo Index) {
	n, bytes := 0, l.tailBytes
	for ; n < len(l.tail)-1 && bytes-l.tail[n].size() >= limit && l.tail[n].Last() <= upTo; n++ {
		bytes -= l.tail[n].size()
	}
	if n > 0 {
		l.dropTail(l.tail[n-1].Last())
	}
}

func (l *raftLog) dropTail(upTo Index) {
	n := 0
	for n < len(l.tail) && l.tail[n].Last() <= upTo {
		l.tailBytes -= l.tail[n].size()
		l.tail[n] = Entries{} // the array outlives the slice's start
		n++
	}
	l.tail = l.tail[n:]
}

// firstInMemory returns the lowest index whose entry is held in memory, last+1 if none is.
func (l *raftLog) firstInMemory() Index {
	if len(l.tail) == 0 {
		return l.last + 1
	}
	return max(l.tail[0].first, l.start.Index+1)
}

// from returns entries from lo on, up to hi and up to maxBytes but at least
// one. It returns false if lo is not in memory (any more).
func (l *raftLog) from(lo, hi Index, maxBytes int) ([]Entries, bool) {
	if lo > hi {
		return nil, true
	}
	if lo < l.firstInMemory() {
		return nil, false
	}
	k := len(l.tail) - 1 // readers are usually near the end
	for l.tail[k].first > lo {
		k--
	}
	var out []Entries
	for ; k < len(l.tail) && maxBytes > 0 && lo <= hi; k++ {
		e := l.tail[k]
		e = e.slice(int(lo-e.first), int(min(e.Last(), hi)-e.first)+1)
		whole := e.Len()
		if len(out) == 0 || e.size() > maxBytes {
			e = e.upTo(maxBytes)
			if len(out) > 0 && e.size() > maxBytes {
				break // the minimum of one entry is for the first run only
			}
		}
		out = append(out, e)
		maxBytes -= e.size()
		lo = e.Last() + 1
		if e.Len() < whole {
			break
		}
	}
	return out, true
}
