package main

import (
	"context"
	"fmt"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"example.com/raft"
)

// What the library answers decides what a client is told; here it answers
// whatever the test wants.
func TestAPIErrors(t *testing.T) {
	unknown := fmt.Errorf("%w: connection lost", raft.ErrOutcomeUnknown)
	for _, c := range []struct {
		method string
		err    error
		code   int
		text   string
		retry  bool
	}{
		{"PUT", raft.ErrNoLeader, 503, "Nothing was changed", true},
		{"PUT", fmt.Errorf("%w: %w", raft.ErrNoLeader, context.DeadlineExceeded), 503, "Nothing was changed", true},
		{"GET", raft.ErrNoLeader, 503, "send it again", true},
		{"PUT", raft.ErrOverloaded, 503, "Nothing was changed", true},
		{"DELETE", raft.ErrStopped, 503, "another", true},
		{"PUT", raft.ErrSuperseded, 503, "Nothing was changed", true},
		{"PUT", unknown, 504, "outcome is unknown", false},
		{"DELETE", unknown, 504, "outcome is unknown", false},
		{"GET", unknown, 503, "send it again", true}, // a read has no effect that could be unknown
		{"PUT", raft.ErrCommandSize, 413, "size", false},
	} {
		if c.err == raft.ErrCommandSize {
			c.text = "too large"
		}
		w := ask(&api{propose: func(context.Context, []byte) (raft.Result, error) { return raft.Result{}, c.err }}, c.method, "/kv/k", "v")
		if w.Code != c.code || !strings.Contains(w.Body.String(), c.text) || (w.Header().Get("Retry-After") != "") != c.retry {
			t.Errorf("%s, %v: %d %q, Retry-After %q", c.method, c.err, w.Code, w.Body, w.Header().Get("Retry-After"))
		}
	}
}

// Requests that can't be executed never reach the log.
func TestAPIRefusesBadRequests(t *testing.T) {
	a := &api{timeout: time.Second, propose: func(context.Context, []byte) (raft.Result, error) {
		t.Error("a bad request was proposed")
		return raft.Result{}, raft.ErrStopped
	}}
	for _, c := range []struct {
		method, path, body string
		header             string
		code               int
	}{
		{"PUT", "/kv/", "v", "", 400},
		{"PUT", "/kv/" + strings.Repeat("k", maxKeyBytes+1), "v", "", 414},
		{"PUT", "/kv/k", strings.Repeat("v", maxValueBytes+1), "", 413},
		{"POST", "/kv/k", "v", "", 405},
		{"PUT", "/kv/k", "v", "If-Match: zero", 400},
		{"PUT", "/kv/k", "v", "If-Match: 0", 400},
		{"PUT", "/kv/k", "v", `If-Match: "1", "2"`, 400},
		{"DELETE", "/kv/k", "v", "If-Match: -1", 400},
		{"PUT", "/kv/k", "v", "If-None-Match: 7", 400},
	} {
		if w := ask(a, c.method, c.path, c.body, c.header); w.Code != c.code || w.Body.Len() == 0 {
			t.Errorf("%s %.20s %s: %d %q, want %d", c.method, c.path, c.header, w.Code, w.Body, c.code)
		}
	}
}

// The largest key and value that are allowed fit into a command.
func TestAPILargestCommand(t *testing.T) {
	s := newStore()
	a := &api{timeout: time.Second, propose: func(_ context.Context, cmd []byte) (raft.Result, error) {
		if len(cmd) > maxCommandBytes {
			t.Errorf("the command has %d bytes, the limit is %d", len(cmd), maxCommandBytes)
		}
		return raft.Result{Data: s.Apply(raft.Entry{Index: 1, Data: cmd})}, nil
	}}
	path := "/kv/" + strings.Repeat("k", maxKeyBytes)
	if w := ask(a, "PUT", path, strings.Repeat("v", maxValueBytes), ""); w.Code != http.StatusCreated {
		t.Errorf("%d %s", w.Code, w.Body)
	}
}

func ask(a *api, method, path, body string, headers ...string) *httptest.ResponseRecorder {
	mux := http.NewServeMux()
	a.register(mux)
	r := httptest.NewRequest(method, path, strings.NewReader(body))
	for _, h := range headers {
		if name, value, ok := strings.Cut(h, ": "); ok {
			r.Header.Set(name, value)
		}
	}
	w := httptest.NewRecorder()
	mux.ServeHTTP(w, r)
	return w
}
