package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/anishathalye/porcupine"

	kvclient "example.com/raft/examples/kv/client"
)

// adders are clients that add 1 to one key, and a watch of that key. Whoever
// runs them breaks nodes meanwhile.
type adders struct {
	clients   []*kvclient.Client
	each      int
	done      sync.WaitGroup
	answered  atomic.Int64
	transport *http.Transport

	mu      sync.Mutex
	history []porcupine.Operation
	errs    []error

	watched  chan struct{} // closed when the watch has ended
	changes  []kvclient.Change
	watchErr error
}

const counter = "adders/counter"

// startAdders begins n clients with each additions. wrap may break their
// connections.
func startAdders(t *testing.T, n, each int, wrap func(http.RoundTripper) http.RoundTripper, urls ...string) *adders {
	t.Helper()
	a := &adders{each: each, transport: &http.Transport{MaxIdleConnsPerHost: 32}, watched: make(chan struct{})}
	ctx, cancel := context.WithTimeout(t.Context(), 3*patience)
	t.Cleanup(a.transport.CloseIdleConnections)
	t.Cleanup(func() { cancel(); a.done.Wait(); <-a.watched })
	var addrs []string
	for _, u := range urls {
		addrs = append(addrs, strings.TrimPrefix(u, "http://"))
	}
	for range n + 1 {
		c, err := kvclient.New(addrs, wrap(a.transport))
		if err != nil {
			t.Fatal(err)
		}
		c.AttemptTimeout = 2 * time.Second
		a.clients = append(a.clients, c)
	}
	watch, began := a.clients[n], time.Now()
	a.clients = a.clients[:n]
	go func() {
		defer close(a.watched)
		for change, err := range watch.Watch(ctx, "adders/", 0) {
			if err != nil {
				a.watchErr = err
				return
			}
			if a.changes = append(a.changes, change); len(a.changes) == n*each {
				return
			}
		}
	}()
	for i, c := range a.clients {
		a.done.Go(func() {
			for range each {
				call := time.Since(began)
				sum, err := c.Add(ctx, counter, 1)
				op := porcupine.Operation{ClientId: i, Call: int64(call), Output: sum, Return: int64(time.Since(began))}
				a.answered.Add(1)
				a.mu.Lock()
				if err != nil {
					a.errs = append(a.errs, err)
				}
				a.history = append(a.history, op)
				a.mu.Unlock()
			}
		})
	}
	return a
}

// waitFor waits until n additions have been answered.
func (a *adders) waitFor(t *testing.T, n int) {
	t.Helper()
	eventually(t, fmt.Sprintf("%d additions", n), func() bool { return a.answered.Load() >= int64(n) })
}

// counterModel is a number to which each operation adds 1 and returns the sum.
var counterModel = porcupine.Model{
	Init: func() any { return int64(0) },
	Step: func(state, _, out any) (bool, any) { return out.(int64) == state.(int64)+1, state.(int64) + 1 },
}

// check waits for the end. Every addition must have been answered, have counted
// once, and have been seen by the watch, which went on with other nodes.
func (a *adders) check(t *testing.T) {
	t.Helper()
	a.done.Wait()
	want := len(a.clients) * a.each
	<-a.watched
	for _, err := range a.errs {
		t.Error(err)
	}
	value, _, err := a.clients[0].Get(t.Context(), counter, kvclient.Linearizable)
	if err != nil || string(value) != fmt.Sprint(want) {
		t.Errorf("the counter is %s, want %d (%v)", value, want, err)
	}
	if !porcupine.CheckOperations(counterModel, a.history) {
		t.Error("the sums that the clients were given are not linearizable")
	}
	if a.watchErr != nil || len(a.changes) != want {
		t.Fatalf("the watch saw %d changes, want %d: %v", len(a.changes), want, a.watchErr)
	}
	index := uint64(0)
	for i, c := range a.changes {
		if string(c.Value) != fmt.Sprint(i+1) || c.Key != counter || c.Index <= index || c.Deleted {
			t.Fatalf("change %d after index %d: %+v", i, index, c)
		}
		index = c.Index
	}
	for _, c := range a.clients {
		if err := c.Close(t.Context()); err != nil {
			t.Error(err)
		}
		if _, err := c.Add(t.Context(), counter, 1); !errors.Is(err, kvclient.ErrClosed) {
			t.Errorf("an addition after Close: %v", err)
		}
	}
}

func unbroken(r http.RoundTripper) http.RoundTripper { return r }

// losing loses the answer to every third write, after a node has executed it.
type losing struct {
	http.RoundTripper
	n atomic.Int64
}

func (l *losing) RoundTrip(r *http.Request) (*http.Response, error) {
	resp, err := l.RoundTripper.RoundTrip(r)
	if err != nil || r.Method == http.MethodGet || l.n.Add(1)%3 != 0 {
		return resp, err
	}
	io.Copy(io.Discard, resp.Body)
	resp.Body.Close()
	return nil, errors.New("the answer was lost")
}

// Answers get lost; what is sent again counts once.
func TestClientWithLostAnswers(t *testing.T) {
	checkLeaks(t)
	c := startCluster(t, t.TempDir(), 0, requestTimeout)
	c.leader(t)
	lose := &losing{}
	a := startAdders(t, 3, 40, func(r http.RoundTripper) http.RoundTripper { lose.RoundTripper = r; return lose },
		c.Nodes()[0].url(), c.Nodes()[1].url(), c.Nodes()[2].url())
	a.check(t)
	if n := lose.n.Load() / 3; n < 40 {
		t.Errorf("only %d answers were lost", n)
	}
}

// The leader is killed three times under load, and started again.
func TestClientUnderLeaderCrashes(t *testing.T) {
	checkLeaks(t)
	c := startCluster(t, t.TempDir(), freePorts(t, 6), requestTimeout)
	c.leader(t)
	const clients, each = 4, 150
	a := startAdders(t, clients, each, unbroken, c.Nodes()[0].url(), c.Nodes()[1].url(), c.Nodes()[2].url())
	for i := range 3 {
		a.waitFor(t, (i+1)*clients*each/5)
		leader := c.leader(t)
		if err := leader.Kill(); err != nil {
			t.Fatal(err)
		}
		a.waitFor(t, (i+1)*clients*each/5+20)
		if err := leader.Start(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	a.check(t)
}

// Everything else that the client does, on real nodes with leases.
func TestClient(t *testing.T) {
	checkLeaks(t)
	c, err := newCluster(t.TempDir(), 0, true, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Stop() })
	if err := c.Start(t.Context()); err != nil {
		t.Skipf("no leases on this machine: %v", err)
	}
	c.leader(t)
	transport := &http.Transport{}
	t.Cleanup(transport.CloseIdleConnections)
	cl, err := kvclient.New([]string{c.Nodes()[0].HTTP, c.Nodes()[1].HTTP, c.Nodes()[2].HTTP}, transport)
	if err != nil {
		t.Fatal(err)
	}
	ctx := t.Context()
	t.Run("keys", func(t *testing.T) { clientKeys(ctx, t, cl) })
	t.Run("watch ends with its node", func(t *testing.T) { watchEnds(ctx, t, c, cl) })
	if err := cl.Close(ctx); err != nil {
		t.Error(err)
	}
}

func clientKeys(ctx context.Context, t *testing.T, cl *kvclient.Client) {
	for _, key := range []string{"plain", "/", ".", "..", "a//b", "%2F?#&", "\xff\x00", "é x"} {
		first, err := cl.Put(ctx, key, []byte("1"), kvclient.IfMissing())
		if err != nil || first == 0 {
			t.Fatalf("%q: %v", key, err)
		}
		if _, err := cl.Put(ctx, key, nil, kvclient.IfMissing()); !errors.Is(err, kvclient.ErrConflict) {
			t.Errorf("%q, if missing: %v", key, err)
		}
		if sum, err := cl.Add(ctx, key, 41); err != nil || sum != 42 {
			t.Errorf("%q: %d, %v", key, sum, err)
		}
		if _, err := cl.Put(ctx, key, nil, kvclient.IfVersion(first)); !errors.Is(err, kvclient.ErrConflict) {
			t.Errorf("%q, if version: %v", key, err)
		}
		for _, level := range []kvclient.Consistency{kvclient.Linearizable, kvclient.Lease} {
			value, version, err := cl.Get(ctx, key, level)
			if err != nil || string(value) != "42" || version <= first {
				t.Errorf("%q, %s: %q at %d, %v", key, level, value, version, err)
			}
		}
		keys, index, err := cl.List(ctx, key, kvclient.Lease)
		if err != nil || len(keys) == 0 || keys[0].Key != key || string(keys[0].Value) != "42" || index < keys[0].Index {
			t.Errorf("%q: list %v at %d, %v", key, keys, index, err)
		}
		if err := cl.Delete(ctx, key, kvclient.IfPresent()); err != nil {
			t.Errorf("%q: %v", key, err)
		}
		if err := cl.Delete(ctx, key, kvclient.Condition{}); !errors.Is(err, kvclient.ErrNotFound) {
			t.Errorf("%q, again: %v", key, err)
		}
		if _, _, err := cl.Get(ctx, key, kvclient.Linearizable); !errors.Is(err, kvclient.ErrNotFound) {
			t.Errorf("%q, read: %v", key, err)
		}
	}
	if _, err := cl.Put(ctx, "word", []byte("word"), kvclient.Condition{}); err != nil {
		t.Fatal(err)
	}
	var status *kvclient.StatusError
	if _, err := cl.Add(ctx, "word", 1); !errors.As(err, &status) || status.Code != 409 || !strings.Contains(status.Text, "not a decimal number") {
		t.Errorf("add to a word: %v", err)
	}
	if _, _, err := cl.Get(ctx, "word", "eventual"); !errors.As(err, &status) || status.Code != 400 {
		t.Errorf("a wrong consistency: %v", err)
	}
}

// A watch of a node that stops is told so and goes on with another one.
func watchEnds(ctx context.Context, t *testing.T, c *Cluster, cl *kvclient.Client) {
	n := c.Nodes()[2]
	for _, stop := range []struct {
		name string
		how  func() error
	}{
		{"in good order", func() error { return n.Stop(true) }},
		{"killed", n.Kill},
	} {
		resp, err := http.Get(n.url() + "/kv/?watch=1")
		if err != nil {
			t.Fatal(err)
		}
		if err := stop.how(); err != nil {
			t.Fatal(err)
		}
		said, err := io.ReadAll(resp.Body)
		resp.Body.Close()
		if told := strings.Contains(string(said), "event: stopped"); stop.name != "killed" && (!told || err != nil) {
			t.Errorf("%s: the watch ended with %q, %v", stop.name, said, err)
		}
		if err := n.Start(ctx); err != nil {
			t.Fatal(err)
		}
	}
	http.DefaultClient.CloseIdleConnections()
	_, from, err := cl.List(ctx, "", kvclient.Linearizable)
	if err != nil {
		t.Fatal(err)
	}
	for i := range 3 {
		if _, err := cl.Add(ctx, "watched", 1); err != nil {
			t.Fatal(err)
		}
		if i == 0 {
			// The history of a node that was started again begins with its log.
			if err := n.Kill(); err != nil {
				t.Fatal(err)
			}
			if err := n.Start(ctx); err != nil {
				t.Fatal(err)
			}
		}
	}
	next := 1
	for change, err := range cl.Watch(ctx, "watched", from) {
		if err != nil || string(change.Value) != fmt.Sprint(next) {
			t.Fatalf("%+v, %v, want %d", change, err, next)
		}
		if next++; next > 3 {
			break
		}
	}
}
