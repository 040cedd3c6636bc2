package main

import (
	"cmp"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode/utf8"

	"example.com/raft"
)

const (
	maxHistory      = 4096    // changes that a node keeps
	maxHistoryBytes = 8 << 20 // of their keys and values
	maxBatch        = 256     // changes that a watch takes at once, so that Apply does not wait long

	stallTimeout  = 10 * time.Second // of one write to a watcher that does not read
	keepAlive     = 5 * time.Second  // between two signs of life
	watchRecovery = "read what is there with GET /kv/?prefix=PREFIX, and watch on with &after= the index in that answer"
)

// history is the newest changes of a node. A watch keeps nothing but its
// position in the log and takes what comes after: so Apply waits for no
// watcher, and one that is too slow finds that the history begins after it.
type history struct {
	changes              []change // ascending by index
	bytes                int
	begin                raft.Index    // every change after this index is in changes
	more                 chan struct{} // closed by the next change; nil if nobody waits
	maxChanges, maxBytes int
}

// change is what one command did to one key. Its JSON is what clients get.
type change struct {
	Index   raft.Index
	Key     string
	Value   []byte
	Deleted bool
}

func (h *history) add(c change) {
	h.changes = append(h.changes, c)
	h.bytes += len(c.Key) + len(c.Value)
	for len(h.changes) > h.maxChanges || h.bytes > h.maxBytes {
		old := &h.changes[0]
		h.begin = old.Index
		h.bytes -= len(old.Key) + len(old.Value)
		*old = change{} // the array lives on for a while, the value must not
		h.changes = h.changes[1:]
	}
	h.wake()
}

// restart forgets everything: the state was replaced by a snapshot up to last.
func (h *history) restart(last raft.Index) {
	h.changes, h.bytes, h.begin = nil, 0, last
	h.wake()
}

func (h *history) wake() {
	if h.more != nil {
		close(h.more)
		h.more = nil
	}
}

// batch is what a watch takes from the history.
type batch struct {
	changes []change
	next    raft.Index      // the position after them
	more    <-chan struct{} // closed when there are more; nil if there are already
	begin   raft.Index      // the history's
}

// changesAfter returns the next changes of keys that begin with prefix after
// position, if the history still has all of them: b.begin is at most position
// then.
func (s *Store) changesAfter(prefix string, position raft.Index) (b batch) {
	s.mu.Lock()
	defer s.mu.Unlock()
	h := &s.history
	b.next, b.begin = position, h.begin
	if position < h.begin {
		return b
	}
	i, found := slices.BinarySearchFunc(h.changes, position, func(c change, at raft.Index) int { return cmp.Compare(c.Index, at) })
	if found {
		i++
	}
	for _, c := range h.changes[i:] {
		if len(b.changes) == maxBatch {
			return b
		}
		b.next = c.Index
		if strings.HasPrefix(c.Key, prefix) {
			b.changes = append(b.changes, c)
		}
	}
	if h.more == nil {
		h.more = make(chan struct{})
	}
	b.more = h.more
	return b
}

// newestIndex returns the index of the newest command applied.
func (s *Store) newestIndex() raft.Index {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.applied
}

// list returns the keys that begin with prefix, in order, as of which index.
func (s *Store) list(prefix string) (keys []change, at raft.Index) {
	s.mu.Lock()
	defer s.mu.Unlock()
	keys = []change{}
	for key, it := range s.items {
		if strings.HasPrefix(key, prefix) {
			keys = append(keys, change{Index: it.version, Key: key, Value: it.value})
		}
	}
	slices.SortFunc(keys, func(a, b change) int { return cmp.Compare(a.Key, b.Key) })
	return keys, s.applied
}

// MarshalJSON shows text as text. JSON has no other bytes: a key or a value that
// is not UTF-8 makes both base64.
func (c change) MarshalJSON() ([]byte, error) {
	shown := struct {
		Index   raft.Index `json:"index"`
		Key     string     `json:"key"`
		Value   string     `json:"value"`
		Deleted bool       `json:"deleted,omitempty"`
		Base64  bool       `json:"base64,omitempty"`
	}{c.Index, c.Key, string(c.Value), c.Deleted, !utf8.ValidString(c.Key) || !utf8.Valid(c.Value)}
	if shown.Base64 {
		shown.Key = base64.StdEncoding.EncodeToString([]byte(c.Key))
		shown.Value = base64.StdEncoding.EncodeToString(c.Value)
	}
	return json.Marshal(shown)
}

// prefix answers GET /kv/?prefix=P: the keys that begin with it, or with
// &watch=1 their changes.
func (a *api) prefix(w http.ResponseWriter, r *http.Request) {
	q := r.URL.Query()
	watch := q.Get("watch")
	if watch != "" && watch != "1" {
		fail(w, http.StatusBadRequest, "watch=%s: want watch=1, or none for a list of the keys", watch)
		return
	}
	if watch == "" && q.Has("after") {
		fail(w, http.StatusBadRequest, "after=%s is for a watch: add watch=1", q.Get("after"))
		return
	}
	if watch == "1" {
		a.watch(w, r)
		return
	}
	store, _, ok := a.storeFor(w, r, q.Get("consistency"))
	if !ok {
		return
	}
	keys, at := store.list(q.Get("prefix"))
	w.Header().Set("Cache-Control", "no-store")
	w.Header().Set("Content-Type", "application/json")
	json.NewEncoder(w).Encode(struct {
		Index raft.Index `json:"index"`
		Keys  []change   `json:"keys"`
	}{at, keys})
}

// watch sends every change of a key under the prefix, in the order of the log,
// as server-sent events whose IDs are log indexes, from after the one that the
// client names, or from now on. The history is bounded: who asks for more is
// answered 410, who can't keep up gets the event "gone" as the last one. The
// event "stopped" is the last one of a node that stops: watch another from there.
func (a *api) watch(w http.ResponseWriter, r *http.Request) {
	from := cmp.Or(r.Header.Get("Last-Event-ID"), r.URL.Query().Get("after")) // a browser that reconnects sends the former
	after, err := strconv.ParseUint(from, 10, 64)
	if err != nil && from != "" {
		fail(w, http.StatusBadRequest, "after=%s: want the index of the last change seen, 0 for all, or none for those from now on", from)
		return
	}
	store, ended, ok := a.storeFor(w, r, linearizable) // so that no client is ahead of it
	if !ok {
		return
	}
	position, newest := raft.Index(after), store.newestIndex()
	if from == "" {
		position = newest
	}
	if position > newest {
		fail(w, http.StatusBadRequest, "after=%d: the newest change is %d: this index is not of this cluster; %s", position, newest, watchRecovery)
		return
	}
	prefix := r.URL.Query().Get("prefix")
	b := store.changesAfter(prefix, position)
	if position < b.begin {
		fail(w, http.StatusGone, "changes after %d are asked for, and this node has those after %d only; %s", position, b.begin, watchRecovery)
		return
	}
	w.Header().Set("Content-Type", "text/event-stream")
	w.Header().Set("X-Content-Type-Options", "nosniff")
	w.Header().Set("Cache-Control", "no-store")
	stream(w, r, store, prefix, b, ended)
}

// stream sends b and all batches after it, until the client or the node is gone.
func stream(w http.ResponseWriter, r *http.Request, store *Store, prefix string, b batch, ended <-chan struct{}) {
	control := http.NewResponseController(w)
	send := func(format string, args ...any) error {
		control.SetWriteDeadline(time.Now().Add(stallTimeout))
		_, err := fmt.Fprintf(w, format, args...)
		return err
	}
	tick := time.NewTicker(keepAlive)
	defer tick.Stop()
	for position := b.next; ; b = store.changesAfter(prefix, position) {
		if position < b.begin {
			send("event: gone\ndata: this watch was too slow: it is at %d, and the history begins after %d; %s\n\n", position, b.begin, watchRecovery)
			return
		}
		for _, c := range b.changes {
			data, err := json.Marshal(c)
			if err == nil {
				err = send("id: %d\ndata: %s\n\n", c.Index, data)
			}
			if err != nil {
				return
			}
		}
		// An ID without data is no event. It moves the client's position past
		// the changes of other keys.
		position = b.next
		if send("id: %d\n\n", position) != nil || control.Flush() != nil {
			return
		}
		if b.more == nil {
			continue
		}
		select {
		case <-b.more:
		case <-tick.C:
		case <-r.Context().Done():
			return
		case <-ended:
			send("event: stopped\ndata: this node stops; watch another one from after %d\n\n", position)
			return
		}
	}
}
