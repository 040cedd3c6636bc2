package main

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"reflect"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"example.com/raft"
)

// put applies a write as the log entry at index.
func put(s *Store, index raft.Index, key, value string) {
	s.Apply(raft.Entry{Index: index, Data: command{op: opPut, key: key, value: []byte(value)}.encode()})
}

// seen returns the indexes of what a watch takes, and its next position.
func seen(s *Store, prefix string, after raft.Index) (indexes []raft.Index, next raft.Index, gone bool) {
	b := s.changesAfter(prefix, after)
	for _, c := range b.changes {
		indexes = append(indexes, c.Index)
	}
	return indexes, b.next, after < b.begin
}

// The history knows from where on it is complete, whatever bound it has reached,
// and also after a snapshot.
func TestHistory(t *testing.T) {
	s := newStore()
	s.history.maxChanges, s.history.maxBytes = 4, 100
	check := func(what, prefix string, after raft.Index, want []raft.Index, next raft.Index, gone bool) {
		t.Helper()
		if got, n, g := seen(s, prefix, after); !slices.Equal(got, want) || n != next || g != gone {
			t.Errorf("%s: after %d: %v, next %d, gone %v; want %v, %d, %v", what, after, got, n, g, want, next, gone)
		}
	}
	check("empty", "", 0, nil, 0, false)
	put(s, 3, "a/1", "x")
	put(s, 5, "b/1", "x")
	s.Apply(raft.Entry{Index: 6, Data: command{op: opDelete, key: "a/1"}.encode()})
	s.Apply(raft.Entry{Index: 7, Data: command{op: opDelete, key: "a/1"}.encode()})                                     // there is none
	s.Apply(raft.Entry{Index: 8, Data: command{op: opPut, condition: condition{kind: ifPresent}, key: "a/2"}.encode()}) // nor is this one
	s.Apply(raft.Entry{Index: 9, Data: command{op: opAdd, key: "b/1", value: []byte("1")}.encode()})                    // which is no number
	s.Apply(raft.Entry{Index: 10, Data: []byte("malformed")})
	s.Apply(raft.Entry{Index: 11, Data: command{op: opAdd, key: "a/3", value: []byte("1")}.encode()})
	check("all", "", 0, []raft.Index{3, 5, 6, 11}, 11, false)
	check("prefix", "a/", 0, []raft.Index{3, 6, 11}, 11, false)
	check("from the middle", "a/", 3, []raft.Index{6, 11}, 11, false)
	check("between two", "a/", 4, []raft.Index{6, 11}, 11, false)
	check("other keys move the position", "none", 3, nil, 11, false)
	check("the end", "", 11, nil, 11, false)
	put(s, 12, "a/4", "x")
	check("before the history", "", 2, nil, 2, true)
	check("at its beginning", "", 3, []raft.Index{5, 6, 11, 12}, 12, false)
	put(s, 13, "a/5", strings.Repeat("v", 95))
	check("bytes: before", "", 11, nil, 11, true)
	check("bytes: at the beginning", "", 12, []raft.Index{13}, 13, false)
	put(s, 14, "a/6", strings.Repeat("v", 200)) // alone over the bound
	check("too large", "", 13, nil, 13, true)
	check("too large, after", "", 14, nil, 14, false)
	s.Apply(raft.Entry{Index: 15, Data: command{op: opDelete, key: "a/5"}.encode()})

	capture, err := s.Snapshot()
	if err != nil {
		t.Fatal(err)
	}
	var file bytes.Buffer
	if err := capture.WriteTo(t.Context(), &file); err != nil {
		t.Fatal(err)
	}
	items := s.items
	s.Apply(raft.Entry{Index: 16, Data: command{op: opDelete, key: "a/6"}.encode()})
	other := newStore()
	put(other, 1, "gone", "x")
	if err := other.Restore(&file); err != nil {
		t.Fatal(err)
	}
	s = other
	check("restored: before", "", 14, nil, 14, true)
	check("restored: at the snapshot", "", 15, nil, 15, false)
	if len(s.items) != 4 || !reflect.DeepEqual(s.items["b/1"], items["b/1"]) || s.newestIndex() != 15 {
		t.Errorf("restored: %d keys at %d", len(s.items), s.newestIndex())
	}
}

// A watch takes no more at once than Apply should wait for, and is told that
// there is more.
func TestHistoryBatches(t *testing.T) {
	s := newStore()
	for i := range raft.Index(2*maxBatch + 1) {
		put(s, i+1, "k", "v")
	}
	var got []raft.Index
	for position := raft.Index(0); ; {
		b := s.changesAfter("", position)
		for _, c := range b.changes {
			got = append(got, c.Index)
		}
		if position = b.next; b.more != nil {
			break
		}
		if len(b.changes) != maxBatch {
			t.Fatalf("a batch of %d", len(b.changes))
		}
	}
	if len(got) != 2*maxBatch+1 || !slices.IsSorted(got) {
		t.Errorf("%d changes", len(got))
	}
}

// storeAPI serves one store, of a node that ends when ended closes.
func storeAPI(s *Store, ended <-chan struct{}) *api {
	return &api{timeout: time.Second, store: func(context.Context, string) (*Store, <-chan struct{}, error) { return s, ended, nil }}
}

// Where a watch begins, what it sends, and how it ends with its node.
func TestWatch(t *testing.T) {
	s := newStore()
	s.history.maxChanges = 4
	ended := make(chan struct{})
	close(ended)
	for i, key := range []string{"lost", "a/1", "b/1", "a/2", "a/\xff"} {
		put(s, raft.Index(10+i), key, "value "+fmt.Sprint(i))
	}
	const stopped = "event: stopped\ndata: this node stops; watch another one from after 14\n\n"
	a1 := "id: 11\ndata: {\"index\":11,\"key\":\"a/1\",\"value\":\"value 1\"}\n\n"
	a2 := "id: 13\ndata: {\"index\":13,\"key\":\"a/2\",\"value\":\"value 3\"}\n\n"
	a3 := "id: 14\ndata: {\"index\":14,\"key\":\"YS//\",\"value\":\"dmFsdWUgNA==\",\"base64\":true}\n\n"
	for _, c := range []struct {
		query, header, want string
		code                int
	}{
		{"prefix=a/&after=10", "", a1 + a2 + a3 + "id: 14\n\n" + stopped, 200},
		{"prefix=a/&after=11", "", a2 + a3 + "id: 14\n\n" + stopped, 200},
		{"prefix=a/&after=10", "Last-Event-ID: 13", a3 + "id: 14\n\n" + stopped, 200},
		{"prefix=a/", "", "id: 14\n\n" + stopped, 200},
		{"prefix=none&after=12", "", "id: 14\n\n" + stopped, 200},
		{"after=9", "", "changes after 9 are asked for, and this node has those after 10 only; read what is there", 410},
		{"after=0", "", "changes after 0", 410},
		{"after=15", "", "after=15: the newest change is 14", 400},
	} {
		w := ask(storeAPI(s, ended), "GET", "/kv/?watch=1&"+c.query, "", c.header)
		if body := w.Body.String(); w.Code != c.code || body != c.want && (c.code == 200 || !strings.HasPrefix(body, c.want)) {
			t.Errorf("%s %s: %d %q, want %d %q", c.query, c.header, w.Code, body, c.code, c.want)
		}
	}
}

// slowWriter is a client that reads when the test lets it.
type slowWriter struct {
	*httptest.ResponseRecorder
	writes, reads chan struct{}
}

func (w *slowWriter) Write(p []byte) (int, error) {
	w.writes <- struct{}{}
	<-w.reads
	return w.ResponseRecorder.Write(p)
}

// A watcher that does not read holds nobody up, and is told at the end that it
// has missed something.
func TestSlowWatcher(t *testing.T) {
	checkLeaks(t)
	s := newStore()
	s.history.maxChanges = 8
	w := &slowWriter{httptest.NewRecorder(), make(chan struct{}), make(chan struct{})}
	mux := http.NewServeMux()
	storeAPI(s, nil).register(mux)
	left := make(chan struct{})
	go func() {
		defer close(left)
		mux.ServeHTTP(w, httptest.NewRequestWithContext(t.Context(), "GET", "/kv/?watch=1", nil))
	}()
	<-w.writes // its position; it reads nothing now
	for i := range raft.Index(100) {
		put(s, i+1, "k", "v")
	}
	go func() {
		for range w.writes {
			w.reads <- struct{}{}
		}
	}()
	w.reads <- struct{}{}
	<-left
	close(w.writes)
	want := "id: 0\n\nevent: gone\ndata: this watch was too slow: it is at 0, and the history begins after 92; read what is there"
	if got := w.Body.String(); !strings.HasPrefix(got, want) {
		t.Errorf("the watcher was sent %q, want %q...", got, want)
	}
}

// pipes is a listener whose connections are net.Pipes, which know virtual time.
type pipes chan net.Conn

func (p pipes) Accept() (net.Conn, error) {
	if c, ok := <-p; ok {
		return c, nil
	}
	return nil, net.ErrClosed
}
func (p pipes) Close() error   { return nil }
func (p pipes) Addr() net.Addr { return &net.TCPAddr{} }

// A watch is not cut by the server's limits for requests, is told of a change at
// once and of its position meanwhile; a client that does not read at all is cut.
func TestWatchLasts(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s, listener := newStore(), make(pipes)
		mux := http.NewServeMux()
		storeAPI(s, nil).register(mux)
		server := newHTTPServer(mux)
		go server.Serve(listener)
		watch := func() net.Conn {
			client, conn := net.Pipe()
			listener <- conn
			fmt.Fprint(client, "GET /kv/?watch=1&prefix=a HTTP/1.1\r\nHost: kv\r\n\r\n")
			return client
		}
		var got syncBuffer
		reads, stalls := watch(), watch()
		left := make(chan struct{})
		go func() {
			defer close(left)
			io.Copy(&got, reads)
		}()
		time.Sleep(10 * time.Minute)
		synctest.Wait()
		if n, want := strings.Count(got.String(), "id: 0\n\n"), 1+int(10*time.Minute/keepAlive); n != want {
			t.Errorf("the position was sent %d times in ten minutes, want %d", n, want)
		}
		put(s, 1, "b", "v")
		synctest.Wait()
		if !strings.Contains(got.String(), "id: 1\n\n") {
			t.Error("the position was not moved past a change of another key")
		}
		put(s, 2, "a", "v")
		synctest.Wait()
		if want := "id: 2\ndata: {\"index\":2,\"key\":\"a\",\"value\":\"v\"}\n\n"; !strings.Contains(got.String(), want) {
			t.Errorf("after ten minutes the watch has not got %q", want)
		}
		if n, err := io.Copy(io.Discard, stalls); n > 0 || err != nil {
			t.Errorf("a client that read nothing for ten minutes was then sent %d bytes, %v", n, err)
		}
		reads.Close()
		<-left
		close(listener)
		server.Close()
	})
}
