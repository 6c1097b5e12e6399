package main

import (
	"maps"
	"testing"

	"holdfast/daemon"
)

func TestQuotasOfSeveralDomainsAddUp(t *testing.T) {
	var q quota
	for _, v := range []string{"a=1GiB,b=2M", "10GiB", "a=3GiB"} {
		if err := q.Set(v); err != nil {
			t.Fatalf("%q: %v", v, err)
		}
	}
	want := map[string]int64{"a": 3 << 30, "b": 2 << 20, daemon.AllDomains: 10 << 30}
	if !maps.Equal(q.bytes, want) {
		t.Errorf("%v, want %v", q.bytes, want)
	}
	var again quota
	if err := again.Set(q.String()); err != nil || !maps.Equal(again.bytes, want) {
		t.Errorf("%q: %v, %v", q.String(), again.bytes, err)
	}
	for _, v := range []string{"", "=1", "a=", "a=-1", "a=1,,b=2", "a"} {
		if err := q.Set(v); err == nil {
			t.Errorf("%q: accepted", v)
		}
	}
	if !maps.Equal(q.bytes, want) {
		t.Errorf("a refused value left %v", q.bytes)
	}
}

func TestPercentIsTakenWithOrWithoutItsSign(t *testing.T) {
	for v, want := range map[string]int{"7": 7, "7%": 7, "0": 0, "99%": 99} {
		var p percent
		if err := p.Set(v); err != nil || p.n != want {
			t.Errorf("%q: %d, %v", v, p.n, err)
		}
	}
	for _, v := range []string{"", "%", "100", "-1", "7.5", "7%%"} {
		var p percent
		if err := p.Set(v); err == nil {
			t.Errorf("%q: accepted", v)
		}
	}
}
